"""Errors meant for the person at the keyboard.

    DistclsError          the run failed                      exit code 1
    ├── UsageError        wrong usage or input                exit code 2
    │   └── BadValue      one field of a config is wrong      exit code 2
    ├── Reported          another process prints its error    that error's
    ├── BadImage          one image cannot be decoded         caught by its caller
    ├── MachineError      an image, by the machine's fault    exit code 1
    └── Stopped           stopped by a signal, resumable      exit code 75

A command prints such an error as one line. Every other exception is a bug in distcls and keeps its
traceback.
"""

from __future__ import annotations

import difflib
import itertools
import re
import reprlib
import textwrap
import traceback
from collections.abc import Iterable
from numbers import Integral
from pathlib import PurePath


class DistclsError(Exception):
    """The base of all errors that are meant for the user; the text is the whole message.

    Raised as such where what was asked for is right and cannot be done: a model that cannot
    compute, a predictor that is closed, a full disk.
    """

    exit_code = 1


class UsageError(DistclsError):
    """An argument, an option or an input is wrong; the text has the value and what to do."""

    exit_code = 2


class BadValue(UsageError):
    """The value of one argument or key is not valid."""

    # raised by a dataclass's own check, which does not know the key and the file that the value
    # came from; `distcls.config.load` adds them

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: {shown(value)} is not valid, expected {expected}")
        self.field = field
        """Name of the argument or key."""
        self.value = value
        """The value that was given."""
        self.expected = expected
        """What is valid, in words."""


class Reported(DistclsError):
    """The main process failed, prints its error, and ends the run in all others."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the main process failed")
        self.exit_code = exit_code


class BadImage(DistclsError):
    """An image that cannot be read or decoded: missing, damaged, too large or of no known format.

    The text is the reason, with the image's name where it is known.
    """


class MachineError(DistclsError):
    """An image could not be read or decoded because the machine lacks memory, descriptors or a
    working file system, after several attempts. The image may be good, so it is not left out."""


class Stopped(DistclsError):
    """A signal, such as that of Ctrl-C, ended a training run, whose state is saved.

    The same call with `resume="auto"` continues it.
    """

    exit_code = 75


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 160


def shown(value: object, most: int = 160) -> str:
    """The `repr` of a value in one line of at most `most` characters, for a message: a value that
    was read may be of any size, or hold itself."""
    try:
        text = " ".join(_SHORT.repr(value).split())
    except ValueError:  # an integer of more digits than Python turns into text
        return "an integer of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 4]} ..."


TURNING = {mark: f"\\u{mark:04x}" for mark in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
"""Embeddings, overrides and isolates of the bidirectional algorithm, and how they are shown."""


def legible(name: str) -> str:
    """A name that was read, its marks of direction escaped: they would turn round the text that
    follows, to the end of its line."""
    return name.translate(TURNING)


def plain(name: str, most: int = 60) -> str:
    """A name that was read, for a line on a terminal: what cannot be printed (controls, marks of
    direction, bytes that are not UTF-8) is escaped, and of more than `most` characters the middle
    is left out: long names often differ at their end."""
    if not name.isprintable():
        name = "".join(each if each.isprintable() else _escaped(each) for each in name)
    half = (most - 3) // 2
    return name if len(name) <= most else f"{name[: most - 3 - half]}...{name[-half:]}"


def _escaped(letter: str) -> str:
    byte = "\udc80" <= letter <= "\udcff"  # as `os.fsdecode` has a byte that is not UTF-8
    return f"\\x{ord(letter) - 0xDC00:02x}" if byte else ascii(letter)[1:-1]


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise BadValue for `field` unless `condition` holds."""
    if not condition:
        raise BadValue(field, value, expected)


def reason_of(error: BaseException) -> str:
    """An error of the user's code, or of a library that it calls, in one line: its type, the first
    line of its text, and where it was raised, in the user's code if that has a part in it."""
    lines = str(error).strip().splitlines()
    text = f": {textwrap.shorten(lines[0], 200, placeholder=' ...')}" if lines else ""
    frames = traceback.extract_tb(error.__traceback__)
    others = ("site-packages", str(PurePath(__file__).parent))
    own = [each for each in frames if not any(part in each.filename for part in others)]
    at = (own or frames)[-1:]
    place = f" ({PurePath(at[0].filename).name}, line {at[0].lineno})" if at else ""
    return f"{type(error).__name__}{text}{place}"


def is_count(value: object) -> bool:
    """Whether it is an integer of at least 1; NumPy's count, true and 2.0 do not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


SYNONYMS = {
    **dict.fromkeys(("accuracy", "acc", "acc1", "val_accuracy", "val_acc", "val_top1"), "top1"),
    **dict.fromkeys(("top5_accuracy", "acc5", "val_top5"), "top5"),
    **dict.fromkeys(("f1", "f1_score", "f1_macro", "val_f1"), "macro_f1"),
    "val_loss": "loss",
    **dict.fromkeys(("ce", "crossentropy", "crossentropyloss", "nll"), "cross_entropy"),
    **dict.fromkeys(("categorical_crossentropy", "softmax"), "cross_entropy"),
    "sparse_categorical_crossentropy": "cross_entropy",
    **dict.fromkeys(("binary_crossentropy", "binary_cross_entropy", "bcewithlogitsloss"), "bce"),
    **dict.fromkeys(("16", "16-mixed", "float16", "half", "amp"), "fp16"),
    **dict.fromkeys(("bf16-mixed", "bfloat16"), "bf16"),
    **dict.fromkeys(("32", "32-true", "float32", "no"), "fp32"),
    **dict.fromkeys(("fit", "finetune"), "train"),
    **dict.fromkeys(("val", "validate", "test", "eval"), "evaluate"),
    **dict.fromkeys(("inference", "infer"), "predict"),
}
"""Other frameworks' words, in lower case, for names that a config or a command line takes."""


MOST_COMPARED = 2000
"""Names that an unknown one is compared with; each takes 20 us."""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice that an unknown name may mean, in whatever case it is written; None if none is
    near."""
    lowered: dict[str, str] = {}
    for each in itertools.islice(choices, MOST_COMPARED):
        lowered.setdefault(each.lower(), each)
    word = name.lower()
    meant = SYNONYMS.get(word, "") if word not in lowered else word
    if meant in lowered:
        return lowered[meant]
    # `triton` is meant for `export-triton`, though `train` is spelt more like it
    near = [each for each in lowered if len(word) > 2 and word in re.split("[-_.]", each)]
    near = near or difflib.get_close_matches(word, lowered, n=1, cutoff=0.6)
    return lowered[near[0]] if near else None


def did_you_mean(name: str, choices: Iterable[str], most: int = 12) -> str:
    """A clause to follow an unknown name: the nearest choice, and the choices if they are few; of
    many the first ones."""
    known = list(choices)
    near = nearest(name, known)
    clause = "" if near is None else f"; did you mean {near!r}?"
    if known and (len(known) <= most or not near):
        shown = ", ".join(known[:most]) + (", ..." if len(known) > most else "")
        clause += f" (choices: {shown})"
    return clause
