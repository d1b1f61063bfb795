"""Building a config dataclass out of values from several sources; the last source wins."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import yaml

from distcls.config.schema import Mismatch, choices, convert, describe, leaves, members
from distcls.config.suggest import suggestion
from distcls.errors import BadValue, UsageError, did_you_mean, nearest, shown
from distcls.files import RECIPES, read_bounded
from distcls.log import warn

C = TypeVar("C")
V = TypeVar("V")

RENAMED = {
    "sync_norm": "sync_batch_norm",
    "layout": "memory_format",
    "max_bad_steps": "max_nonfinite_steps",
    "model.norm_momentum": "model.batch_norm_momentum",
    "loader.ahead": "loader.prefetch",
    "augment.cutmix_share": "augment.cutmix_probability",
    "distill.share": "distill.weight",
    "average.last": "average.last_epochs",
    "checkpoint.keep": "checkpoint.keep_last",
    "checkpoint.name": "checkpoint.filename",
    "checkpoint.keep_best": "checkpoint.save_top_k",
    "checkpoint.best_only": "checkpoint.save_best_only",
    "checkpoint.whole": "checkpoint.save_training_state",
}
"""Training's config keys by their names in 0.1.0. A user of such a name gets a deprecation warning;
files that are read without a user's doing (saved states, model cards) keep it."""


MAX_BYTES = 1 << 20
"""Largest config file that is read."""
MAX_DEPTH = 20
"""Levels that a config file may nest."""
BELOW = 2**63
"""Whole numbers of a config file, without their sign."""
MAX_NODES = 100_000
"""Values that a config file may hold once its aliases are unfolded; class weights may be many."""


_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")


class Given(NamedTuple):
    """A raw value and its source, for error messages."""

    value: Any
    source: str


def config_file(name: str | os.PathLike[str]) -> Path:
    """The file that `--config` means: one of that name, else the recipe."""
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's raises for users it does not know
    recipes = RECIPES.paths()
    if path.exists() and not path.is_dir():
        return path
    text = os.fspath(name)
    if text in recipes:
        return recipes[text]
    if path.name == text and not path.suffix:
        raise UsageError(f"no file or recipe is called {text!r}{did_you_mean(text, recipes)}")
    if path.stem in recipes:
        advice = f"{path.stem} is the recipe that comes with distcls"
        raise UsageError(f"cannot read config {text}: no such file; {advice}")
    return path


def read_yaml(path: Path) -> dict[str, Given]:
    """Read a YAML file of nested keys into dotted ones. Raises UsageError if it cannot be read."""
    try:
        text = read_bounded(path, MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read config {path}: {_reason(error)}") from error
    content = parse_yaml(text, str(path))
    return {key: Given(value, str(path)) for key, value in flatten(content).items()}


def parse_yaml(text: str, source: str) -> dict[Any, Any]:
    """The mapping that a YAML text holds, {} if it is empty.

    Raises UsageError, with `source` in its message, for what is not valid, for a key that is there
    twice, and for what unfolds without bound (`MAX_DEPTH`, `MAX_NODES`).
    """
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it does not parse"
        raise UsageError(f"{source}{where}: not valid YAML: {problem}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{source}: expected a mapping of keys to values")
    return content


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds; its errors are all of YAMLError, with the line.

    Aliases are references: nested ones unfold to more than memory holds ("billion laughs"), so
    nodes are counted as often as they are referred to.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._refuse(f"nested deeper than {MAX_DEPTH} levels")
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            self._refuse("an alias to what it is part of")
        if not alias:
            self._sizes[id(node)] = size = 1 + sum(self._sizes[id(n)] for n in _parts(node))
            if size > MAX_NODES:
                self._refuse(f"more than {MAX_NODES:,} values, aliases unfolded")
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, IndexError) as error:
            # of a number or date that is none, such as 2024-13-45 or 0x_
            problem = f"{shown(node.value)} is not a value of its kind"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_yaml_int(self, node: Any) -> int:
        """Decimal ones alone: YAML 1.1 takes 012 for 10, 1:30 for 90 and 1_0 for 10."""
        text = self.construct_scalar(node)
        problem = ""
        if not _WHOLE.fullmatch(text):
            problem = f"{shown(text)} is not a decimal number; in quotes it is a text"
        elif len(text) > 20 or abs(int(text)) >= BELOW:
            problem = f"{shown(text)} is too large, expected a number below 2^63"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return int(text)

    def construct_yaml_float(self, node: Any) -> float:
        text = self.construct_scalar(node)
        if "_" in text or ":" in text:
            problem = f"{shown(text)} is not a decimal number; in quotes it is a text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return float(super().construct_yaml_float(node))

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                problem = f"the key {shown(key.value)} is there twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                keys.add(key.value)
        return node

    def _refuse(self, problem: str) -> NoReturn:
        parser: Any = self  # of a library without types
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=parser.peek_event().start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _parts(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, dict)
        found = flatten(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
        if twice := next((each for each in found if each in flat), None):
            raise UsageError(f"the key {shown(twice)} is there twice, nested and dotted")
        flat |= found
    return flat


def current_names(values: Mapping[str, V], section: str = "") -> dict[str, V]:
    """Dotted values with each renamed key under its present name.

    `section`, such as `model.`, is the prefix of the keys in the whole config. Raises
    UsageError if a key is there under both names.
    """
    current: dict[str, V] = {}
    for key, value in values.items():
        name = RENAMED.get(section + key, section + key).removeprefix(section)
        if name != key and name in values:
            raise UsageError(f"{key} is the old name of {name}; give one of the two")
        current[name] = value
    return current


def old_names(known: Iterable[str]) -> dict[str, str]:
    """The renamed keys of a config that has the `known` keys: old names to new ones."""
    present = set(known)
    return {old: new for old, new in RENAMED.items() if new in present and old not in present}


def _rename(layers: Sequence[dict[str, Given]], known: Iterable[str]) -> list[dict[str, Given]]:
    """The layers under the present names; one line warns of all old ones."""
    table = old_names(known)
    met = {key: table[key] for layer in layers for key in layer if key in table}
    if not met:
        return list(layers)
    changes = ", ".join(f"{old} is now {new}" for old, new in met.items())
    warn(f"{changes}; the old name{'s' * (len(met) > 1)} will be removed")
    return [current_names(layer) for layer in layers]


def build(cls: type[C], *layers: dict[str, Given]) -> C:
    """Make a `cls` from layers of dotted values; later layers win.

    Raises UsageError naming the key, the value, the allowed values and its source.
    """
    known = {leaf.key: leaf for leaf in leaves(cls)}
    mappings = [
        key
        for key, leaf in known.items()
        if any(typing.get_origin(member) is dict for member in members(leaf.type))
    ]
    given: dict[str, Given] = {}
    for layer in _rename([_by_name(layer, known) for layer in layers], known):
        given.update(_gather(layer, mappings))
    values: dict[str, Any] = {}
    for key, (raw, source) in given.items():
        if key not in known:
            _refuse_section(key, raw, source, known)
            meant = suggestion(key, {each: each for each in known})
            raise UsageError(f"{source}: unknown key {shown(key)}{meant}")
        try:
            values[key] = convert(raw, known[key].type)
        except Mismatch:
            expected = describe(known[key].type)
            near = nearest(shown(raw).strip("'"), choices(known[key].type))
            hint = "" if near is None else f"; did you mean {near!r}?"
            raise UsageError(
                f"{source}: {key}: {shown(raw)} is not valid, expected {expected}{hint}"
            ) from None
    return typing.cast(C, _construct(cls, "", values, given))


def options_layer(cls: type, options: Mapping[str, object]) -> dict[str, Given]:
    """Options as Python has them, for `build`: a section is a dict, one of its dataclass, or the
    value of its `name` alone, be it a text, a function or a class; keys may be dotted too."""
    hints = _hints(cls)
    tree = {key: _section(value, hints.get(key)) for key, value in options.items()}
    return {key: Given(value, "options") for key, value in flatten(tree).items()}


def _section(value: object, kind: Any) -> object:
    if not dataclasses.is_dataclass(kind):
        return value
    named = "name" in _hints(typing.cast(type, kind))
    named = named and (isinstance(value, str) or callable(value))
    return {"name": value} if named else _plain(value)


def take_plain_values(config: object) -> None:
    """Convert the values of a config under construction as those of files are converted: the text
    of a path, a list of sizes, a dict of a section. For its `__post_init__`.

    Raises BadValue for a value that does not fit, UsageError for one in a section.
    """
    cls: type = type(config)
    hints = _hints(cls)
    for field in dataclasses.fields(typing.cast(Any, config)):
        value, kind = getattr(config, field.name), hints[field.name]
        if value is field.default:
            continue
        if not dataclasses.is_dataclass(kind):
            try:
                value = convert(value, kind)
            except Mismatch:
                raise BadValue(field.name, value, describe(kind)) from None
        elif not isinstance(value, typing.cast(type, kind)):
            inside = _section(value, kind)
            if not isinstance(inside, Mapping):
                raise BadValue(field.name, value, "a dict with its keys")
            given = {key: Given(each, field.name) for key, each in flatten(dict(inside)).items()}
            value = build(typing.cast(type, kind), given)
        object.__setattr__(config, field.name, value)  # frozen for everybody else


def told(cls: type[C]) -> type[C]:
    """Decorate a config dataclass: its call raises UsageError, not TypeError, for a keyword that is
    no key, with the nearest, and for a key that is missing."""
    make = cls.__init__
    fields = dataclasses.fields(typing.cast(Any, cls))
    known = {field.name: field.name for field in fields}
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    @functools.wraps(make)
    def checked(self: C, *positional: Any, **options: Any) -> None:
        if strange := next((key for key in options if key not in known), None):
            keys = {leaf.key: leaf.key for leaf in leaves(cls)} | known
            raise UsageError(f"{cls.__name__}: unknown key {strange!r}{suggestion(strange, keys)}")
        if missing := [key for key in needed if key not in options]:
            raise UsageError(f"{cls.__name__}: {', '.join(missing)} is missing")
        make(self, *positional, **options)

    setattr(cls, "__init__", checked)  # noqa: B010 - mypy refuses the assignment
    return cls


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _gather(layer: dict[str, Given], mappings: list[str]) -> dict[str, Given]:
    """A layer with the keys below one that takes a mapping merged back into one value."""
    gathered: dict[str, Given] = {}
    for key, given in layer.items():
        place = next((name for name in mappings if key.startswith(name + ".")), None)
        if place is None:
            gathered[key] = given
        else:
            inside = gathered.setdefault(place, Given({}, given.source)).value
            inside[key.removeprefix(place + ".")] = given.value
    return gathered


def _by_name(layer: dict[str, Given], known: Collection[str]) -> dict[str, Given]:
    """A layer in which a section that is a name alone, `model: resnet50`, is `model.name`, as the
    flag `--model resnet50` is."""
    named: dict[str, Given] = {}
    for key, given in layer.items():
        inside = f"{key}.name"
        alone = key not in known and inside in known and isinstance(given.value, str)
        if alone and inside in layer:
            raise UsageError(
                f"{given.source}: {key} and {inside} are the same key; give one of the two"
            )
        named[inside if alone else key] = given
    return named


def _refuse_section(key: str, raw: object, source: str, known: Iterable[str]) -> None:
    """Add a hint if `key` is a section, such as one left empty in YAML."""
    inside = [name for name in known if name.startswith(key + ".")]
    if inside:
        raise UsageError(
            f"{source}: {key}: {shown(raw)} is not valid: {key!r} is a section with the keys "
            f"{', '.join(inside)}"
        )


def _construct(cls: type, prefix: str, values: dict[str, Any], given: dict[str, Given]) -> Any:
    hints = _hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            kind = typing.cast(type, hints[field.name])
            arguments[field.name] = _construct(kind, key + ".", values, given)
        elif key in values:
            arguments[field.name] = values[key]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            flag = key.replace("_", "-")
            raise UsageError(f"{key} is missing; give it as --{flag}" + _or_config(given))
    try:
        return cls(**arguments)
    except BadValue as error:
        key = prefix + error.field
        source = given[key].source + ": " if key in given else ""
        raise UsageError(
            f"{source}{key}: {shown(error.value)} is not valid, expected {error.expected}"
        ) from None


def _or_config(given: dict[str, Given]) -> str:
    files = {g.source for g in given.values() if g.source.endswith((".yaml", ".yml"))}
    return f" or in {', '.join(sorted(files))}" if files else ""


def dump_yaml(config: Any, without: Collection[str] = ()) -> str:
    """The config as YAML that `read_yaml` and `build` turn into an equal config; `without` keys at
    the top are left out."""
    tree = {key: value for key, value in _plain(config).items() if key not in without}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
