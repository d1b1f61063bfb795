"""Checkpoints to ONNX, certified on real images."""
