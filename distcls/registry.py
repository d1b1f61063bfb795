"""Named implementations that a config chooses from: networks, losses, optimisers and more.

An implementation of the user's own joins by `@REGISTRY.register("name", option=default)` in a
module of theirs. The config reaches it as `module:attribute`, or by its name where the environment
variable `DISTCLS_IMPORT` names the module (or modules, separated by commas).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from distcls.errors import BadValue, UsageError, did_you_mean, require

T = TypeVar("T")
C = TypeVar("C")

IMPORTS = "DISTCLS_IMPORT"
"""Environment variable with the modules to import before the first lookup."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry(Generic[T]):
    """A registered implementation."""

    value: T
    defaults: dict[str, Any]
    """Option keys that it reads, with their default values (null in the config)."""
    registered: bool = True
    """Whether it was registered by a decorator, rather than found by an import path."""


class Registry(Generic[T]):
    """Implementations by name, with the config keys that each of them reads.

    A config section chooses by the key `key`, such as `optimizer.name`; its other keys that stand
    in any entry's defaults are options, null unless they are set.
    """

    def __init__(
        self, noun: str, key: str, *, home: str | None = None, prefixes: tuple[str, ...] = ()
    ) -> None:
        """`home` is the module that registers the built-in ones, imported when first needed;
        `prefixes` are libraries, so that `timm:NAME` is no import path."""
        self.noun, self.key = noun, key
        self._home, self._prefixes = home, prefixes
        self._field = key.rpartition(".")[2]
        self._entries: dict[str, Entry[T]] = {}

    def register(self, name: str, **defaults: Any) -> Callable[[C], C]:
        """Decorate an implementation; `defaults` are the options it reads. Raises ValueError for a
        name that is taken by another."""

        def add(value: C) -> C:
            taken = self._entries.get(name)
            if taken is not None and _origin(taken.value) != _origin(value):
                raise ValueError(f"{self.noun} {name!r} is registered already: {taken.value!r}")
            entry: Entry[Any] = Entry(value=value, defaults=defaults)
            self._entries[name] = entry
            return value

        return add

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
        module, _, attribute = name.partition(":")
        parts = [*module.split("."), attribute]
        return module not in self._prefixes and all(part.isidentifier() for part in parts)

    def find(self, name: str) -> Entry[T]:
        """The implementation of that name. Raises BadValue for an unknown one, naming the nearest,
        and UsageError for an import path that leads nowhere."""
        # nothing is imported for a name that is there: defaults are checked while modules load
        if name in self._entries or name in self.names():
            return self._entries[name]
        if self.is_import_path(name):
            return self._imported(name)
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
        for option in self._options():
            value = getattr(config, option)
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
        module = _import(path, f"{self.key}: {name!r}")
        try:
            value: Any = getattr(module, attribute)
        except AttributeError:
            hint = did_you_mean(attribute, [key for key in vars(module) if key[0] != "_"])
            raise UsageError(f"{self.key}: {path} has no {attribute!r}{hint}") from None
        registered = (entry for entry in self._entries.values() if entry.value is value)
        return next(registered, Entry(value=value, defaults={}, registered=False))


def _origin(value: Any) -> tuple[str, str]:
    """Where a class or function is defined, the same if its module is loaded once more."""
    return getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(value))


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
        raise UsageError(f"{asked_by}: no module {module!r}; is it on PYTHONPATH?") from None
