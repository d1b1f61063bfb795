"""`python -m export.triton --model best.onnx --out DIR`: `distcls export-triton`."""

from distcls.cli import run
from distcls.commands.triton import main

if __name__ == "__main__":
    run(main)
