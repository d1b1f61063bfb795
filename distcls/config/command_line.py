"""A command line made from a dataclass: its fields are the flags, their docstrings the help.

argparse, because a user's mistake is to end in one line that names the key, the value, the choices
and the file, the same for a flag and for YAML. tyro 1.0.17 prints a box of five to eight lines and
does not know the file (tried 2026-11; it also adds 60 ms to every command).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shutil
import textwrap
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from distcls import log
from distcls.config.load import (
    RENAMED,
    Given,
    build,
    config_file,
    dump_yaml,
    old_names,
    read_yaml,
)
from distcls.config.schema import (
    MISSING,
    Leaf,
    Mismatch,
    convert,
    leaves,
    members,
    metavar,
    sections,
)
from distcls.config.suggest import suggestion
from distcls.errors import UsageError

C = TypeVar("C")

WIDEST = 100
"""Columns of the help, on terminals that have as many."""
HELP = frozenset(("-h", "--help"))
OTHERS = "other options"
"""Title of the group of flags that no other group names."""
SECTIONS = """\
The flags are the keys of the YAML file: --optimizer.weight-decay 0.1 is optimizer: {weight_decay:
0.1}, and --optimizer NAME is optimizer: {name: NAME}. `none`, in YAML null, stands for no value.
Of a flag given twice the last value counts: a script can be given more flags."""
CONFIG_HELP = """YAML file of the keys below, or the name of a recipe (`distcls recipes` lists
them); given more than once, the later file wins key by key, and flags win over all files"""
PRINT_HELP = """print the config of files, flags and defaults as YAML on standard output and stop;
no images are read and nothing is written, and what depends on the images stays auto or null"""


def positional(default: Any = MISSING) -> Any:
    """A dataclass field that is a positional argument on the command line."""
    return dataclasses.field(default=default, metadata={"positional": True})


def repeated() -> Any:
    """A field, a tuple of texts, whose flag is given once for each of them."""
    return dataclasses.field(default=(), metadata={"repeated": True})


def bare(value: str) -> Any:
    """A field that is null unless its flag is given; the flag without a value means `value`."""
    return dataclasses.field(default=None, metadata={"bare": value})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Generic[C]):
    """A command: the dataclass of its options, and what its help says."""

    options: type[C]
    prog: str
    about: str
    examples: tuple[str, ...] = ()
    """Command lines that the help shows."""
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """The keys that the help lists first, by the titles of their groups; of those in two groups
    the first counts. A section is a group anyway."""
    config: bool = False
    """Whether the options may come from `--config FILE`, and `--print-config` prints them."""
    aside: Collection[str] = ()
    """Keys of such a file that this command ignores."""
    resolver: str | None = None
    """The `module:function` that fills in, for `--print-config`, the defaults that depend on other
    options; only then is it imported."""

    def parse(self, arguments: Sequence[str]) -> C:
        """Build the options from command-line arguments and config files.

        Raises UsageError for anything wrong; prints and leaves with 0 for `--help` and
        `--print-config`.
        """
        fields = leaves(self.options)
        renamed = _under_old_names(fields)
        parser = self._parser(fields, helps=not HELP.isdisjoint(arguments))
        for leaf in renamed:
            _add_flag(parser, leaf, argparse.SUPPRESS)
        words = _spelt_out(arguments, fields + renamed)
        # intermixed: several positional arguments may stand before and after the flags; argparse
        # takes what follows `--` for flags then
        mixed = parser.parse_known_intermixed_args
        options, unknown = (parser.parse_known_args if "--" in words else mixed)(words)
        if unknown:
            raise UsageError(self._unexpected(unknown, fields))
        layers = (
            [read_yaml(config_file(name)) for name in options.config or ()] if self.config else []
        )
        layers = [
            {key: raw for key, raw in layer.items() if key not in self.aside} for layer in layers
        ]
        flags = {
            leaf.key: Given(value, "command line")
            for leaf in fields + renamed
            if (value := getattr(options, leaf.key)) is not None
        }
        if self.config and options.print_config:
            self._print(fields, *layers, flags)
            raise SystemExit(0)
        return build(self.options, *layers, flags)

    def flags(self) -> Iterator[tuple[str, Leaf | None, str]]:
        """Each flag that the help lists, its field if it has one, and what it does in a line."""
        for leaf in leaves(self.options):
            if not leaf.positional:
                yield _shown(leaf), leaf, textwrap.shorten(leaf.doc, 60, placeholder=" ...")
        if self.config:
            yield "--config", None, "YAML file of the keys, or a recipe"
            yield "--print-config", None, "print the config as YAML and stop"
        yield "--help", None, "show the help and stop"

    def _print(self, fields: list[Leaf], *layers: dict[str, Given]) -> None:
        """Print the config; a required path that is not given yet is left out."""
        given = {key for layer in layers for key in layer}
        paths = [leaf.key for leaf in fields if leaf.default is MISSING and leaf.type is Path]
        missing = {key: Given("not given", "") for key in paths if key not in given}
        config = build(self.options, missing, *layers)
        if self.resolver:
            module, _, function = self.resolver.partition(":")
            config = getattr(importlib.import_module(module), function)(config)
        if log.rank() == 0:
            with log.writing_output():
                print(dump_yaml(config, without=missing), end="")

    def _unexpected(self, unknown: list[str], fields: list[Leaf]) -> str:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        known = {leaf.key: _shown(leaf) for leaf in fields}
        if self.config:
            known |= {"config": "--config", "print_config": "--print-config"}
        name = word.partition("=")[0]
        hint = suggestion(name, known) if name.startswith("-") else ""
        return f"unexpected argument {word!r}{hint}; see {self.prog} --help"

    def _parser(self, fields: list[Leaf], *, helps: bool) -> argparse.ArgumentParser:
        """`helps`: whether the help of each flag will be shown, which takes its time."""
        flags = [leaf for leaf in fields if leaf.default is MISSING and not leaf.positional]
        needed = [f"{_shown(leaf)} {_placeholder(leaf)}" for leaf in flags]
        places = [_place(leaf) for leaf in fields if leaf.positional]
        usage = " ".join([self.prog, *places, *needed, *["[--config FILE ...]"] * self.config])
        examples = "".join(f"\n  {line}" for line in self.examples)
        parser = _Parser(
            prog=self.prog,
            usage=usage + " [options]",
            description=self.about + ("\n\nexamples:" + examples if examples else ""),
            epilog=SECTIONS if self.config else None,
            formatter_class=_Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        for title, about, inside in self._grouped(fields):
            group = parser.add_argument_group(title if self.groups else "options", about)
            for leaf in inside:
                _add(group, leaf, helps=helps)
            if self.config and title == next(iter(self.groups), OTHERS):
                group.add_argument("--config", action="append", metavar="FILE", help=CONFIG_HELP)
            if self.config and title == OTHERS:
                group.add_argument("--print-config", action="store_true", help=PRINT_HELP)
            if title == OTHERS:
                group.add_argument("-h", "--help", action="help", help="show this help and stop")
        return parser

    def _grouped(self, fields: list[Leaf]) -> Iterator[tuple[str, str | None, list[Leaf]]]:
        """The groups of the help in their order: title, description, fields."""
        left = {leaf.key: leaf for leaf in fields}
        for title, keys in self.groups.items():
            yield title, None, [left.pop(key) for key in keys if key in left]
        yield OTHERS, None, [leaf for leaf in left.values() if "." not in leaf.key]
        for section, about in sections(self.options).items():
            inside = [leaf for leaf in left.values() if leaf.key.rpartition(".")[0] == section]
            yield section, about, inside


def parse(
    cls: type[C],
    arguments: Sequence[str],
    *,
    prog: str,
    about: str,
    config: bool = False,
    aside: Collection[str] = (),
) -> C:
    """`Command.parse` of a command whose help has no groups and examples."""
    command = Command(options=cls, prog=prog, about=about, config=config, aside=aside)
    return command.parse(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class _Formatter(argparse.HelpFormatter):
    """Help as wide as the terminal, which keeps the lines of the examples."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(WIDEST, shutil.get_terminal_size().columns)
        super().__init__(prog, **{"width": width - 2, "max_help_position": 28, **options})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        about, gap, rest = text.partition("\n\n")
        return textwrap.fill(
            about, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        ) + (gap + rest)


def _spelt_out(arguments: Sequence[str], fields: list[Leaf]) -> list[str]:
    """The arguments with each flag in the one spelling that argparse is given.

    `--quiet INPUT` becomes `--quiet=true INPUT`: argparse would take INPUT for the flag's value.
    And `--data DATA` becomes `DATA` where it is positional: other commands have it as a flag.
    """
    by_name = {name: leaf for leaf in fields for name in _names(leaf)}
    end = arguments.index("--") if "--" in arguments else len(arguments)
    words: list[str] = []
    for place, word in enumerate(arguments[:end]):
        name, given, value = word.partition("=")
        leaf = by_name.get(name)
        if leaf is None:
            words.append(word)
        elif leaf.positional:
            words += [value] * bool(given)
        elif leaf.bare and not given and not _fits("".join(arguments[place + 1 : end][:1]), leaf):
            words.append(f"{_shown(leaf)}={leaf.bare}")
        else:
            words.append(_shown(leaf) + given + value)
    return words + list(arguments[end:])


def _fits(word: str, leaf: Leaf) -> bool:
    try:
        convert(word, leaf.type)
    except Mismatch:
        return False
    return True


def _place(leaf: Leaf) -> str:
    """A positional argument in the line of usage."""
    name = leaf.key.upper() + " ..." * _several(leaf)
    return name if leaf.default is MISSING else f"[{name}]"


def _add(group: Any, leaf: Leaf, *, helps: bool) -> None:
    text = f"{leaf.doc} {_default(leaf)}".strip().replace("%", "%%") if helps else ""
    if leaf.positional:
        count = None if leaf.default is MISSING else "?"
        count = "+" if _several(leaf) else count
        group.add_argument(leaf.key, metavar=leaf.key.upper(), help=text, nargs=count)
    else:
        _add_flag(group, leaf, text)


def _add_flag(group: Any, leaf: Leaf, text: str) -> None:
    extra: dict[str, Any] = {"nargs": "?", "const": leaf.bare} if leaf.bare else {}
    if leaf.repeated:
        extra = {"action": "append"}
    group.add_argument(_shown(leaf), dest=leaf.key, metavar=_placeholder(leaf), help=text, **extra)


def _under_old_names(fields: list[Leaf]) -> list[Leaf]:
    """The renamed fields once more, under the names that they had; `--help` does not list them."""
    by_key = {leaf.key: leaf for leaf in fields}
    names = old_names(by_key)
    return [dataclasses.replace(by_key[new], key=old) for old, new in names.items()]


def _several(leaf: Leaf) -> bool:
    """Whether a positional argument may be given more than once."""
    return any(typing.get_origin(kind) is tuple for kind in members(leaf.type))


def _names(leaf: Leaf) -> list[str]:
    """The flags that a leaf may be given by; `--model NAME` is short for `--model.name NAME`."""
    return list(dict.fromkeys([_shown(leaf), _flag(leaf), "--" + leaf.key]))


def _shown(leaf: Leaf) -> str:
    """The flag of a leaf that the help lists."""
    section, _, last = leaf.key.rpartition(".")
    return "--" + section if last == "name" and section and leaf.key not in RENAMED else _flag(leaf)


def _flag(leaf: Leaf) -> str:
    return "--" + leaf.key.replace("_", "-")


def _placeholder(leaf: Leaf) -> str:
    if leaf.repeated:
        return "TEXT"
    can_unset = type(None) in members(leaf.type) and leaf.default is not None
    return metavar(leaf.type) + "|none" * can_unset


def _default(leaf: Leaf) -> str:
    if leaf.default is MISSING:
        return "[required]"
    if leaf.default is None or leaf.default is False or leaf.default in ((), ""):
        return ""
    if isinstance(leaf.default, tuple):
        return f"[default: {','.join(map(str, leaf.default))}]"
    plain = str(leaf.default).lower() if leaf.default is True else str(leaf.default)
    return f"[default: {plain.removesuffix('.0')}]"
