"""From images to predictions, without torch: ONNX session, streaming, batch prediction."""
