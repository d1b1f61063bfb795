"""`python -m export.triton --model best.onnx --out DIR`: a Triton or KServe repository."""

from distcls.cli import run
from distcls.commands.export import main_triton

if __name__ == "__main__":
    run(main_triton)
