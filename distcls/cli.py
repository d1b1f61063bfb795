"""The `distcls` command: finds the door and opens it. Nothing heavy is imported before that."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from distcls import __version__
from distcls.door import run
from distcls.errors import UsageError, did_you_mean

COMMANDS = {
    "prepare": ("distcls.prepare", "make a dataset directory from images, IDX files or a manifest"),
    "models": ("distcls.list_models", "networks by name, with parameters, MACs and input size"),
    "train": (
        "distcls.train",
        "train a model (several processes: accelerate launch -m distcls.train)",
    ),
    "show": ("distcls.show", "training images as the network is given them, with their labels"),
    "evaluate": ("distcls.evaluate", "metrics of a .pth or .onnx model on a split"),
    "export": ("export.onnx", "best.pth to best.onnx, checked on real images"),
    "predict": ("distcls.predict", "predictions for many images as CSV, JSONL or Parquet"),
}

HELP = f"""usage: distcls COMMAND [options]

From a folder of images to a served, verified classifier.

commands:
{chr(10).join(f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items())}

`distcls COMMAND --help` lists a command's options.
Exit codes: 0 done, 1 failed, 2 wrong usage or input, 75 stopped by a signal and ready to resume.
"""


def dispatch(arguments: Sequence[str]) -> None:
    """Run the command named by the first argument. Raises UsageError for an unknown one."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
    elif name == "--version":
        print(f"distcls {__version__}")
    elif name in COMMANDS:
        importlib.import_module(COMMANDS[name][0]).main(arguments[1:])
    else:
        raise UsageError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")


def main() -> None:
    """Entry point of the `distcls` script."""
    run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
