"""A command line made from a dataclass: its fields are the flags, their docstrings the help.

argparse, because a user's mistake is to end in one line that names the key, the value, the choices
and the file, the same for a flag and for YAML. tyro 1.0.17 prints a box of five to eight lines and
does not know the file (tried 2026-11; it also adds 60 ms to every command).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from distcls.config.load import RENAMED, Given, build, old_names, read_yaml
from distcls.config.schema import MISSING, Leaf, Mismatch, convert, describe, leaves, members
from distcls.errors import UsageError, did_you_mean

C = TypeVar("C")


def positional(default: Any = MISSING) -> Any:
    """A dataclass field that is a positional argument on the command line."""
    return dataclasses.field(default=default, metadata={"positional": True})


def repeated() -> Any:
    """A field, a tuple of texts, whose flag is given once for each of them."""
    return dataclasses.field(default=(), metadata={"repeated": True})


def bare(value: str) -> Any:
    """A field that is null unless its flag is given; the flag without a value means `value`."""
    return dataclasses.field(default=None, metadata={"bare": value})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse(
    cls: type[C],
    arguments: Sequence[str],
    *,
    prog: str,
    about: str,
    config: bool = False,
    aside: Collection[str] = (),
) -> C:
    """Build a `cls` from command-line arguments; with `config`, also from `--config FILE`.

    `aside` are keys of the file that this command ignores. Raises UsageError for
    anything wrong; prints and leaves with 0 for `--help`.
    """
    fields = leaves(cls)
    renamed = _under_old_names(fields)
    parser = _parser(fields, prog, about, config)
    for leaf in renamed:
        _add_flag(parser, leaf, argparse.SUPPRESS)
    # intermixed: several positional arguments may stand before and after the flags
    words = _spelt_out(arguments, fields + renamed)
    options, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        names = [_flag(leaf) for leaf in fields if not leaf.positional] + ["--config"] * config
        name = unknown[0].partition("=")[0]
        hint = _nearest_flag(name, names) if name.startswith("-") else ""
        raise UsageError(f"unexpected argument {unknown[0]!r}{hint}; see {prog} --help")
    layers = [read_yaml(Path(options.config))] if config and options.config else []
    layers = [{key: raw for key, raw in layer.items() if key not in aside} for layer in layers]
    flags = {
        leaf.key: Given(value, "command line")
        for leaf in fields + renamed
        if (value := getattr(options, leaf.key)) is not None
    }
    return build(cls, *layers, flags)


ELSEWHERE = {
    "--input.size": {"image-size", "img-size", "imgsz", "size", "resolution", "crop-size"},
    "--lr": {"learning-rate", "lr0", "base-lr"},
    "--model.name": {"arch", "architecture", "backbone", "network"},
    "--model.pretrained": {"weights", "initial-checkpoint", "finetune"},
    "--loader.workers": {"num-workers", "nworkers", "j"},
    "--out": {"output", "output-dir", "save-dir", "project", "o"},
    "--data": {"data-dir", "dataset", "data-path", "root"},
    "--epochs": {"num-epochs", "n-epochs", "max-epochs"},
    "--batch-size": {"batch", "bs", "b", "per-device-train-batch-size"},
    "--precision": {"amp", "fp16", "bf16", "half", "mixed-precision"},
    "--monitor.patience": {"early-stopping", "early-stop"},
    "--accumulate": {"grad-accum", "grad-accum-steps", "gradient-accumulation-steps"},
}
"""What other training scripts call a flag."""


def _nearest_flag(name: str, names: list[str]) -> str:
    """The clause of `did_you_mean`; those that are right but for their section come first."""
    plain = name.lstrip("-").replace("_", "-")
    for flag, others in ELSEWHERE.items():
        if plain in others and flag in names:
            return f"; did you mean {flag!r}?"
    ends = {flag: flag.rpartition(".")[2].lstrip("-") for flag in names}
    near = difflib.get_close_matches(plain, set(ends.values()), n=1, cutoff=0.85)
    found = [flag for flag, end in ends.items() if end in near]
    if len(found) == 1:
        return f"; did you mean {found[0]!r}?"
    return f" (choices: {', '.join(found)})" if found else did_you_mean(name, names, sort=True)


def _spelt_out(arguments: Sequence[str], fields: list[Leaf]) -> list[str]:
    """`--quiet INPUT` to `--quiet=true INPUT`: argparse would take INPUT for the flag's value.

    And `--data DATA` to `DATA` where it is positional: other commands have it as a flag.
    """
    alone = {name: leaf for leaf in fields if leaf.bare for name in _names(leaf)}
    places = [f"--{leaf.key}" for leaf in fields if leaf.positional]
    words = [word for word in arguments if word not in places]
    for name in places:
        words = [word.removeprefix(name + "=") for word in words]
    for place, word in enumerate(words):
        if word in alone and not _fits("".join(words[place + 1 : place + 2]), alone[word].type):
            words[place] = f"{word}={alone[word].bare}"
    return words


def _fits(word: str, kind: Any) -> bool:
    try:
        convert(word, kind)
    except Mismatch:
        return False
    return True


def _parser(fields: list[Leaf], prog: str, about: str, config: bool) -> argparse.ArgumentParser:
    places = [leaf.key.upper() + " ..." * _several(leaf) for leaf in fields if leaf.positional]
    usage = " ".join([prog, *places, *["[--config FILE]"] * config, "[--key value ...]"])
    parser = _Parser(prog=prog, usage=usage, description=about, allow_abbrev=False)
    if config:
        text = "YAML file of the keys below; flags win over it"
        parser.add_argument("--config", metavar="FILE", help=text)
    for leaf in fields:
        text = f"{leaf.doc} ({describe(leaf.type)}{_default(leaf)})".replace("%", "%%")
        if leaf.positional:
            count = None if leaf.default is MISSING else "?"
            count = "+" if _several(leaf) else count
            name = leaf.key.upper()
            parser.add_argument(leaf.key, metavar=name, help=text, nargs=count)
            continue
        _add_flag(parser, leaf, text)
    return parser


def _add_flag(parser: argparse.ArgumentParser, leaf: Leaf, text: str) -> None:
    extra: dict[str, Any] = {"nargs": "?", "const": leaf.bare} if leaf.bare else {}
    if leaf.repeated:
        extra = {"action": "append"}
    parser.add_argument(*_names(leaf), dest=leaf.key, metavar="V", help=text, **extra)


def _under_old_names(fields: list[Leaf]) -> list[Leaf]:
    """The renamed fields once more, under the names that they had; `--help` does not list them."""
    by_key = {leaf.key: leaf for leaf in fields}
    names = old_names(by_key)
    return [dataclasses.replace(by_key[new], key=old) for old, new in names.items()]


def _several(leaf: Leaf) -> bool:
    """Whether a positional argument may be given more than once."""
    return any(typing.get_origin(kind) is tuple for kind in members(leaf.type))


def _names(leaf: Leaf) -> list[str]:
    """The flags of a leaf; `--model NAME` is short for `--model.name NAME`."""
    section, _, last = leaf.key.rpartition(".")
    named = last == "name" and section and leaf.key not in RENAMED
    short = ["--" + section] if named else []
    return list(dict.fromkeys([_flag(leaf), "--" + leaf.key, *short]))


def _flag(leaf: Leaf) -> str:
    return "--" + leaf.key.replace("_", "-")


def _default(leaf: Leaf) -> str:
    if leaf.default is MISSING or leaf.default is None:
        return ""
    if isinstance(leaf.default, tuple):
        return f", default {','.join(map(str, leaf.default))}"
    return f", default {str(leaf.default).lower() if leaf.type is bool else leaf.default}"
