"""The `distcls` command: its subcommands, exit codes, and errors as the user sees them."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from distcls import __version__, log
from distcls.errors import DistclsError, Reported, Stopped, UsageError, did_you_mean, shown

Main = Callable[[Sequence[str]], None]

EXTRAS = {
    "pyarrow": "parquet",
    "matplotlib": "plot",
    **dict.fromkeys(("accelerate", "onnx", "onnxscript", "sklearn", "timm"), "train"),
    **dict.fromkeys(("psutil", "safetensors", "scipy", "torch", "torchvision"), "train"),
    **dict.fromkeys(("fsspec", "gcsfs", "s3fs"), "remote"),
    **dict.fromkeys(("httptools", "multipart", "orjson", "prometheus_client", "uvicorn"), "serve"),
    **dict.fromkeys(("grpc", "google"), "serve-grpc"),
    "optuna": "search",
    "ray": "ray",
}
"""Optional packages by import name, and the extra that installs each."""

INTERRUPTED = 130
"""Exit code of a program ended by Ctrl-C, as shells have it: 128 + SIGINT."""


def run(main: Main, arguments: Sequence[str] | None = None) -> NoReturn:
    """Call `main` with the command line, print its error if any, and exit with its code."""
    _open_standard_streams()
    _exit(_exit_code(main, sys.argv[1:] if arguments is None else arguments))


def _open_standard_streams() -> None:
    """Give what was started without a terminal (`2>&-`, some services) streams that lead nowhere.

    Python's are None then, and the next file that is opened gets the free descriptor: a C library's
    warning on descriptor 2 would be written into the predictions. Text that standard output cannot
    encode is escaped, as Python does on standard error: a class name ends no evaluation.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # the lowest free descriptor, which is this one; our children inherit it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            if descriptor == 1:
                log.set_output_closed()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123 - open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _exit_code(main: Main, arguments: Sequence[str]) -> int:
    interrupted = threading.Event()
    try:
        with _recording_interrupts(interrupted):
            main(arguments)
            sys.stdout.flush()
    except Stopped as stopped:
        log.say(str(stopped))
        return stopped.exit_code
    except Reported as error:
        return error.exit_code
    except DistclsError as error:
        log.fail(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        log.fail("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of our output is gone (`| head`); keep the interpreter from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if interrupted.is_set():
            # an extension module being imported (NumPy, PyArrow) turns KeyboardInterrupt into
            # another error
            log.fail("interrupted")
            return INTERRUPTED
        known = _explained(error)
        if known is not None:
            log.fail(str(known))
            return known.exit_code
        traceback.print_exc()
        return 1
    return 0


def _explained(error: Exception) -> DistclsError | None:
    """What to say of an error of Python or a library that is not a bug; None for any other."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        advice = missing_package(error)
        return None if advice is None else UsageError(advice)
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(f"{shown(error.filename)}: {error.strerror}")
    if "DefaultCPUAllocator: can't allocate memory" in text:
        return DistclsError(f"out of memory: {text.partition('DefaultCPUAllocator: ')[2]}")
    library = isinstance(error, ImportError) and "failed to map segment" in text
    if library or isinstance(error, MemoryError) or "can't start new thread" in text:
        return DistclsError(f"out of memory, or a limit of the system: {text or 'MemoryError'}")
    return None


@contextlib.contextmanager
def _recording_interrupts(interrupted: threading.Event) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, as Python has it, and sets the event, too."""

    def interrupt(*_: object) -> NoReturn:
        interrupted.set()
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def missing_package(error: ModuleNotFoundError) -> str | None:
    """What to install where an optional package is missing; None for any other module."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    advice = f'pip install "distcls[{EXTRAS[package]}]"'
    return f"this needs {package}, which is not installed; {advice}"


@contextlib.contextmanager
def packages_for(what: str) -> Iterator[None]:
    """A block for programs: UsageError, saying what to install, where an optional package lacks."""
    try:
        yield
    except ModuleNotFoundError as error:
        advice = missing_package(error)
        if advice is None:
            raise
        raise UsageError(f"{what}: {advice}") from error


def import_pandas() -> Any:
    """pandas, for a `to_dataframe`. Raises UsageError if it is not installed."""
    try:
        import pandas
    except ModuleNotFoundError as error:
        message = "to_dataframe needs pandas, which is not installed; pip install pandas"
        raise UsageError(message) from error
    return pandas


def _exit(code: int) -> NoReturn:
    if log.world_size() > 1 or _reader_hangs():
        # One of multiple processes: gloo's threads may outlive Python's and abort it at exit
        # ("terminate called without an active exception", seen in 1 of 6 two-process runs). For a
        # thread that hangs in a read Python would wait for ever. Everything is written by now, so
        # nothing is lost without the interpreter's finalisation.
        sys.stdout.flush()
        sys.stderr.flush()
        if code == 0:
            leave_process_group()
        os._exit(code)
    sys.exit(code)


def leave_process_group() -> None:
    """End the connections between the processes, if there are any; their threads may otherwise
    outlive Python's."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _reader_hangs() -> bool:
    """Whether one of distcls's reading threads still runs; Python would wait for its pool."""
    return any(thread.name.startswith("distcls-") for thread in threading.enumerate())


COMMANDS = {
    "prepare": (
        "distcls.commands.prepare",
        "make a dataset directory from images, IDX files or a manifest",
    ),
    "audit": (
        "distcls.commands.audit",
        "copies, broken files, odd images and wrong labels of a dataset",
    ),
    "models": ("distcls.commands.models", "networks by name, with parameters, MACs and input size"),
    "train": (
        "distcls.commands.train",
        "train a model (several processes: accelerate launch -m distcls.train)",
    ),
    "cv": ("distcls.commands.cv", "cross-validation: a run for each fold, mean and interval"),
    "lr-find": (
        "distcls.commands.lr_find",
        "a learning rate, by a short run whose rate grows until it diverges",
    ),
    "show": (
        "distcls.commands.show",
        "augmented training images as the network gets them, with labels",
    ),
    "merge": ("distcls.commands.merge", "the mean of the weights of several runs, as one best.pth"),
    "evaluate": ("distcls.commands.evaluate", "metrics of a .pth or .onnx model on a split"),
    "report": ("distcls.commands.report", "one HTML page about a run, with its mistakes"),
    "compare": ("distcls.commands.compare", "whether one model is better than another, or chance"),
    "calibrate": (
        "distcls.commands.calibrate",
        "probabilities that can be believed, in a .pth or .onnx model",
    ),
    "export": ("distcls.commands.export", "best.pth to best.onnx, compared on real images"),
    "export-triton": (
        "distcls.commands.triton",
        "best.onnx into a model repository for Triton or KServe",
    ),
    "predict": ("distcls.commands.predict", "predictions for many images as CSV, JSONL or Parquet"),
    "serve": ("distcls.commands.serve", "a model, or a folder of models, over HTTP"),
    "recipes": (
        "distcls.commands.shipped:RECIPES_COMMAND",
        "configs of training runs, for --config NAME",
    ),
    "templates": (
        "distcls.commands.shipped:TEMPLATES_COMMAND",
        "files for accelerate, torchrun, SLURM and Kubernetes",
    ),
    "completion": ("distcls.commands.completion", "a script that completes commands and flags"),
}

HELP = f"""usage: distcls COMMAND [options]
       distcls [help [COMMAND] | --help | --version]

From a folder of images to a served, verified classifier.

commands:
{chr(10).join(f"  {name:<13} {about}" for name, (_, about) in COMMANDS.items())}

`distcls COMMAND --help`, or `distcls help COMMAND`, lists a command's options.
Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 findings with audit --strict,
75 stopped by a signal and ready to resume.
"""


def load_command(name: str) -> Any:
    """The module or object of a command: `main`, and `COMMAND`, which describes its options."""
    module, _, inside = COMMANDS[name][0].partition(":")
    found = importlib.import_module(module)
    return getattr(found, inside) if inside else found


HELPS = ("help", "--help", "-h")


def dispatch(arguments: Sequence[str]) -> None:
    """Run the command named by the first argument. Raises UsageError for an unknown one."""
    name, *rest = arguments or ["--help"]
    if name in HELPS and not set(rest) - set(HELPS):
        print(HELP, end="")
        return
    if name in HELPS:
        name, rest = rest[0], ["--help"]
    if name in ("-V", "--version"):
        print(f"distcls {__version__}")
    elif name in COMMANDS:
        load_command(name).main(rest)
    else:
        raise UsageError(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}")


def main() -> None:
    """Entry point of the `distcls` script."""
    run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
