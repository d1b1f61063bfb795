"""The HTTP server: one model file, or a folder of them, behind the Open Inference Protocol."""
