"""Named implementations that a config chooses from: networks, losses, optimisers and more.

An implementation of the user's own joins by `@REGISTRY.register("name", option=default)` in a
module, script or notebook of theirs. The config reaches it by that name where the module is
imported already or named by the environment variable `DISTCLS_IMPORT` (or modules, separated by
commas), or as `module:name` and `module:attribute`, which imports it. Files record `module:name`
(`Registry.recorded`). What Python code hands over as an object gets a text by `reference`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from distcls.errors import BadValue, UsageError, did_you_mean, require, shown

T = TypeVar("T")
C = TypeVar("C")

IMPORTS = "DISTCLS_IMPORT"
"""Environment variable with the modules to import before the first lookup."""
MAIN, OBJECT = "__main__", "object"
"""In place of a module: this process's script or notebook; an object that no module holds."""
PACKAGE = "distcls"
IMPORT_PATH = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([\w.-]+)")
NAME = re.compile(r"[\w.-]+")
"""What may be registered; `IMPORT_PATH` ends in it."""
_objects: dict[str, Any] = {}
"""What `reference` was given, by its text, and by what another process recorded for it."""
_TOKEN = re.compile(r"-[0-9a-f]{8}(?=-\d+$|$)")
"""The process in the name of an object."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry(Generic[T]):
    """A registered implementation."""

    value: T
    defaults: dict[str, Any]
    """Option keys that it reads, with their default values (null in the config)."""
    registered: bool = True
    """Whether it was registered by a decorator, rather than found by an import path."""
    module: str = PACKAGE
    """The module that registered it."""

    @property
    def own(self) -> bool:
        """Whether it is the user's own, not one of distcls."""
        return self.module.partition(".")[0] != PACKAGE

    def is_of(self, module: str) -> bool:
        """Whether `module` registered it; a script's may have moved into a module since."""
        return module == self.module or (module == MAIN and self.own)


class Registry(Generic[T]):
    """Implementations by name, with the config keys that each of them reads.

    A config section chooses by the key `key`, such as `optimizer.name`; its other keys that stand
    in any entry's defaults are options, null unless they are set.
    """

    def __init__(
        self,
        noun: str,
        key: str,
        *,
        home: str | None = None,
        prefixes: tuple[str, ...] = (),
        library_of: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        """`home` is the module that registers the built-in ones, imported when first needed;
        `prefixes` are libraries, so that `timm:NAME` is no import path; `library_of` tells whose a
        name is that is found without being registered."""
        self.noun, self.key = noun, key
        self._home, self._prefixes, self._library_of = home, prefixes, library_of
        self._field = key.rpartition(".")[2]
        self._entries: dict[str, Entry[T]] = {}
        self._found: set[str] = set()
        """Import paths that configs of this process have named."""

    def register(self, name: str, **defaults: Any) -> Callable[[C], C]:
        """Decorate an implementation; `defaults` are the options it reads.

        Raises UsageError for what is no name, for a name of a library's, and for one that is taken
        by another: what is defined anew under the same name, as in a cell of a notebook that is run
        again, is none.
        """
        self._require_name(name)

        def add(value: C) -> C:
            module = sys._getframe(1).f_globals.get("__name__", MAIN)
            if module.partition(".")[0] != PACKAGE:
                self._require_free(name, value)
            entry: Entry[Any] = Entry(value=value, defaults=defaults, module=module)
            self._entries[name] = entry
            return value

        return add

    def _require_name(self, name: object) -> None:
        """Raise UsageError unless files can hold `module:name` and it is found by that again."""
        if isinstance(name, str) and NAME.fullmatch(name):
            return
        decorator = f"@distcls.register_{self.noun.replace('iser', 'izer')}"
        if isinstance(name, str):
            why = f"{shown(name)} is no name; letters, digits, '_', '-' and '.' make one"
        else:
            why = f"{shown(name)} is no text; the decorator takes the name"
        raise UsageError(f'{decorator}: {why}, as in {decorator}("mine")')

    def _require_free(self, name: str, value: object) -> None:
        """Raise UsageError if the name is that of something else."""
        if self._home is not None:
            importlib.import_module(self._home)  # the built-in names are taken
        taken = self._entries.get(name)
        library = self._library_of(name)
        if taken is not None and _origin(taken.value) != _origin(value):
            whose = f"already: {shown(taken.value)}" if taken.own else "by distcls"
            raise UsageError(f"{self.noun} {name!r} is registered {whose}; choose another name")
        if library is not None:
            raise UsageError(
                f"{self.noun} {name!r} is a name of {library}'s, by which it would not be found "
                "any more; choose another name"
            )

    def names(self) -> tuple[str, ...]:
        """All registered names, in their order."""
        if self._home is not None:
            importlib.import_module(self._home)
        import_modules(os.environ.get(IMPORTS, ""))
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        """Whether it is a registered name or an import path."""
        known = name in self._entries or name in self.names()
        return known or (isinstance(name, str) and self.is_import_path(name))

    def is_import_path(self, name: str) -> bool:
        """Whether a name is of the form `module:attribute`."""
        parts = IMPORT_PATH.fullmatch(name)
        return parts is not None and parts[1] not in self._prefixes

    def recorded(self, name: str) -> str:
        """The name that files hold: of the user's own with its module, `module:name`, by which a
        later process finds it, or says what is missing."""
        entry = self._entries.get(name)
        if entry is None or not entry.own or self.is_import_path(name):
            return name
        return f"{entry.module}:{name}"

    def knows(self, name: str) -> bool:
        """Whether an import path is of what was registered by that module, or has been found by
        this process already. Nothing is imported."""
        path, _, attribute = name.partition(":")
        entry = self._entries.get(attribute)
        if name in self._found or (entry is not None and entry.is_of(path)):
            return True
        if path == OBJECT:  # the name that another process recorded for what was found here
            value = _objects.get(name, self)
            return any(_objects.get(each) is value for each in self._found)
        value = getattr(sys.modules.get(path), attribute, None)
        return any(each.value is value for each in self._entries.values())

    def short(self, name: str) -> str:
        """The name that output shows: without the module, unless another is registered so; of an
        object without its process, so that a resumed run shows the same."""
        path, _, inside = name.partition(":")
        if path == OBJECT:
            return _TOKEN.sub("", inside)
        entry = self._entries.get(inside)
        clash = entry is not None and not entry.is_of(path)
        return name if clash or not self.is_import_path(name) else inside

    def own_name(self, name: str | None) -> str | None:
        """The name if it is of the user's own, else None. Nothing is imported."""
        if name is None or (self.is_import_path(name) and not name.startswith(f"{PACKAGE}.")):
            return name
        entry = self._entries.get(name)
        return name if entry is not None and entry.own else None

    def find(self, name: str) -> Entry[T]:
        """The implementation of that name. Raises BadValue for an unknown one, naming the nearest,
        and UsageError for an import path that leads nowhere."""
        # nothing is imported for a name that is there: defaults are checked while modules load
        if name in self._entries or name in self.names():
            return self._entries[name]
        if self.is_import_path(name):
            found = self._imported(name)
            self._found.add(name)
            return found
        hint = did_you_mean(name, self._entries)
        raise BadValue(self.key, name, f"a known {self.noun}, or module:attribute{hint}")

    def check(self, config: Any) -> None:
        """Raise BadValue, for a field of the section `config`: an unknown name, or an option that
        is set although the chosen implementation does not read it."""
        name = getattr(config, self._field)
        try:
            reads = {} if name is None else self.find(name).defaults
        except BadValue as error:
            raise BadValue(self._field, error.value, error.expected) from None
        known = vars(config)
        if strange := next((option for option in reads if option not in known), None):
            section = self.key.rpartition(".")[0]
            raise UsageError(
                f"{self.key}: {name} was registered with the option {strange!r}, which is no key "
                f"of {section}{did_you_mean(strange, known)}"
            )
        for option in self._options():
            value = known.get(option)
            if option not in reads:
                require(value is None, option, value, self._null(name, reads))

    def filled(self, config: C) -> C:
        """The config section with each null option that its implementation reads set to the
        default. Nothing is chosen where the name is null or another library's."""
        name = getattr(config, self._field)
        if name is None or name not in self:
            return config
        defaults = self.find(name).defaults
        unset = {key: value for key, value in defaults.items() if getattr(config, key) is None}
        return dataclasses.replace(config, **unset)  # type: ignore[type-var]

    def _options(self) -> Iterable[str]:
        return dict.fromkeys(key for entry in self._entries.values() for key in entry.defaults)

    def _null(self, name: str | None, reads: Iterable[str]) -> str:
        if name is None:
            return f"null without {self.key}"
        keys = ", ".join(reads)
        return f"null, as {name} does not read it" + (f" (it reads {keys})" if keys else "")

    def _imported(self, name: str) -> Entry[T]:
        path, _, attribute = name.partition(":")
        if path != OBJECT and path not in sys.modules:
            _import(path, f"{self.key}: {name!r}")
        entry = self._entries.get(attribute)
        if entry is not None and entry.is_of(path):
            return entry
        value: Any = attribute_of(name, self.key)
        registered = (entry for entry in self._entries.values() if entry.value is value)
        plain = Entry(value=value, defaults={}, registered=False, module=path)
        return next(registered, plain)


def attribute_of(name: str, key: str) -> Any:
    """What `module:attribute` names, its module imported; `key` is the config key that names it.

    Raises UsageError for an import path that leads nowhere, saying what to do.
    """
    path, _, attribute = name.partition(":")
    if name in _objects:
        return _objects[name]
    if not attribute:
        raise UsageError(f"{key}: {name!r} is not valid, expected module:attribute")
    if path == OBJECT:
        raise UsageError(
            f"{key}: {name!r} was an object given to distcls.fit, which no file can hold; give it "
            "again from Python, or put it into a module and name it as module:attribute"
        )
    module = _import(path, f"{key}: {name!r}")
    if hasattr(module, attribute):
        return getattr(module, attribute)
    if path == MAIN:
        raise UsageError(
            f"{key}: {attribute!r} was defined in a script or notebook, and not in this one; "
            "run its definition first, or put it into a module and name it as module:attribute"
        )
    hint = did_you_mean(attribute, [each for each in vars(module) if each[0] != "_"])
    raise UsageError(f"{key}: {path} has no {attribute!r}{hint}")


def reference(value: object) -> str:
    """The text that stands for an object in a config: `module:attribute` where that leads to it.

    `__main__:attribute` and `object:NAME-PROCESS` (numbered where there are several:
    `object:NAME-PROCESS-2`) stand for what no other process finds; PROCESS is random, so that
    another's object of the same name is not taken for it. `attribute_of` gives the object back.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module in sys.modules and getattr(sys.modules[module], name, None) is value:
        return f"{module}:{name}"
    plain = re.sub(r"\W+", "_", name.rpartition(".")[2] or type(value).__name__).strip("_")
    first = text = f"{OBJECT}:{plain}-{_token(os.getpid())}"
    number = 1
    while _objects.get(text, value) is not value:
        number += 1
        text = f"{first}-{number}"
    _objects[text] = value
    return text


@functools.cache
def _token(process: int) -> str:
    """What tells a process from all others; a forked one has its own."""
    return os.urandom(4).hex()


def same_reference(one: object, other: object) -> bool:
    """Whether two recorded names may mean the same: they are equal, but for the process and number
    of an object, or one is of a script or notebook whose definition has moved into a module since.

    An object that is given again, to the run of another process, has that one's name from here on:
    it opens what the run has written.
    """
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    (first, _, name), (second, _, moved) = one.partition(":"), other.partition(":")
    if first == second == OBJECT:
        same = name.partition("-")[0] == moved.partition("-")[0]
        for known, unknown in ((one, other), (other, one)):
            if same and known in _objects:
                _objects.setdefault(unknown, _objects[known])
        return same
    return name == moved != "" and MAIN in (first, second)


def kind_of(value: object) -> str:
    """What a value is, for a message."""
    return "None" if value is None else f"of the type {type(value).__name__}"


def parameters_of(function: Any) -> list[inspect.Parameter]:
    """The parameters that a callable is called with; of a PyTorch module those of its `forward`."""
    forward = getattr(function, "forward", None)
    called = function if forward is None or isinstance(function, type) else forward
    try:
        return list(inspect.signature(called).parameters.values())
    except (TypeError, ValueError):  # one written in C
        return []


def positional(function: Any) -> tuple[int, int]:
    """The least and the largest number of positional arguments that a callable takes; (0, 99)
    where it does not say."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = parameters_of(function)
    found = [each for each in parameters if each.kind in kinds]
    least = sum(each.default is inspect.Parameter.empty for each in found)
    anything = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    return (least, 99) if anything else (least, len(found)) if parameters else (0, 99)


def require_takes(
    key: str, name: str, function: Any, arguments: str, *given: Any, **named: Any
) -> None:
    """Raise UsageError for a callable of the user's that cannot be called with what it is given;
    `arguments` says that in words."""
    try:
        inspect.signature(function).bind(*given, **named)
    except TypeError as error:
        raise UsageError(f"{key}: {name} cannot be called with {arguments}: {error}") from None
    except ValueError:  # one written in C does not say
        return


def _origin(value: Any) -> tuple[Any, ...]:
    """Where a class or function is defined, the same if its module is loaded once more.

    What the place of its definition does not tell from others has more: a lambda its code, a
    function within another what it has from there, any other object its attributes.
    """
    if isinstance(value, functools.partial):
        return functools.partial, _origin(value.func), repr((value.args, value.keywords))
    place = getattr(value, "__module__", ""), getattr(value, "__qualname__", None)
    if place[1] is None:
        return place[0], type(value).__qualname__, repr(getattr(value, "__dict__", value))
    if not inspect.isfunction(value) or "<" not in value.__qualname__:
        return place
    code = value.__code__ if value.__name__ == "<lambda>" else None
    held = [cell.cell_contents for cell in value.__closure__ or ()]
    return *place, code, repr((held, value.__defaults__, value.__kwdefaults__))


@functools.cache
def import_modules(names: str) -> None:
    """Import the modules of a list separated by commas. Raises UsageError for one that is not
    there."""
    for name in filter(None, (part.strip() for part in names.split(","))):
        _import(name, IMPORTS)


def _import(module: str, asked_by: str) -> Any:
    """Import a module; an error inside it keeps its traceback."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        top = module.partition(".")[0]
        here = os.path.exists(top) or os.path.exists(f"{top}.py")  # noqa: PTH110
        advice = "PYTHONPATH=. finds the one in this folder" if here else "is it on PYTHONPATH?"
        raise UsageError(f"{asked_by}: no module {module!r}; {advice}") from None
