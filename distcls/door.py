"""How every command ends: errors for the user as one line and a code, bugs with their traceback."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from distcls import log
from distcls.errors import DistclsError, Stopped, UsageError

Main = Callable[[Sequence[str]], None]

EXTRAS = {
    "pyarrow": "parquet",
    "matplotlib": "plot",
    **dict.fromkeys(("accelerate", "onnx", "onnxscript", "sklearn", "timm"), "train"),
    **dict.fromkeys(("psutil", "safetensors", "scipy", "torch", "torchvision"), "train"),
}
"""Packages that not every install has, and the extra that brings each."""

INTERRUPTED = 130
"""What shells expect of a program that Ctrl-C ended."""


def run(main: Main, arguments: Sequence[str] | None = None) -> NoReturn:
    """Call `main` with the command line and leave with the code that its outcome asks for."""
    _leave(_outcome(main, sys.argv[1:] if arguments is None else arguments))


def _outcome(main: Main, arguments: Sequence[str]) -> int:
    try:
        main(arguments)
        sys.stdout.flush()
    except Stopped as stopped:
        log.say(str(stopped))
        return stopped.exit_code
    except DistclsError as error:
        log.fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        log.fail("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output left (`| head`); keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            advice = f'pip install "distcls[{EXTRAS[package]}]"'
            log.fail(f"this needs {package}, which is not installed; {advice}")
            return UsageError.exit_code
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    if log.world_size() > 1 or _hanging():
        # One of several processes: gloo's threads may outlive Python's and abort it on its way out
        # ("terminate called without an active exception", seen in 1 of 6 two-process runs). A
        # thread that hangs in a read: Python would wait for it for ever.
        # Everything is written by now, so the interpreter need not be taken down piece by piece.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _hanging() -> bool:
    """Whether a reading thread of ours is still at work; Python would wait for its pool."""
    return any(thread.name.startswith("distcls-") for thread in threading.enumerate())
