"""`python -m export.onnx --ckpt best.pth`: the `export` command."""

from distcls.cli import run
from distcls.commands.export import main

if __name__ == "__main__":
    run(main)
