"""`python -m export.triton --model best.onnx --out DIR`: a Triton or KServe repository."""

from distcls.cli import run
from distcls.export.triton import main

if __name__ == "__main__":
    run(main)
