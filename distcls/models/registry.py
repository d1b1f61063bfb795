"""The networks by name: registered ones, torchvision's and timm's."""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distcls.errors import UsageError, did_you_mean
from distcls.registry import IMPORTS, MAIN, OBJECT, PACKAGE, Registry, import_modules

Library = Literal["distcls", "torchvision", "timm"]


def _library_of(name: str) -> str | None:
    """The library that has a network of that name, be it with a tag of weights."""
    plain = name.partition(".")[0]
    if plain in ALIASES:
        return "timm"
    if plain in _names_in("torchvision"):
        return "torchvision"
    return "timm" if plain in _names_in("timm") and not _is_registered_by_user(plain) else None


NETWORKS: Registry[Any] = Registry(
    "model",
    "model.name",
    home="distcls.models.simple",
    prefixes=("torchvision", "timm"),
    library_of=_library_of,
)
"""Networks of neither library: called with the number of classes, and with `size` and `dropout`
where they take them, they return an nn.Module from float [N, 3, H, W] to logits [N, classes]."""
register_model = NETWORKS.register
"""Decorate a class or function that makes a network of your own: `@distcls.register_model("name")`.
See `NETWORKS`. Raises UsageError for a name that is taken, torchvision's or timm's, or none."""
ALIASES = {
    "adv-efficientnet-b0": "timm:tf_efficientnet_b0.ap_in1k",
    "adv-efficientnet-b1": "timm:tf_efficientnet_b1.ap_in1k",
    "adv-efficientnet-b2": "timm:tf_efficientnet_b2.ap_in1k",
    "se_resnext50_32x4d": "timm:seresnext50_32x4d",
    "xception": "timm:legacy_xception",
}
"""Other names of networks of the libraries."""
POPULAR = (
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    *(name for name in ALIASES if name.startswith("adv-")),
    "efficientnet_v2_s",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "se_resnext50_32x4d",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "densenet121",
    "xception",
    "convnext_tiny",
    "swin_t",
)
"""The libraries' networks that `distcls models` lists without a pattern; each is tested to
export."""


class Origin(NamedTuple):
    """The library of a network, and its name."""

    library: Library
    """distcls: registered in `NETWORKS`, or an import path."""
    name: str
    """Its name there; timm's may end in the tag of its weights: `resnet50.a1_in1k`."""


def listed() -> tuple[str, ...]:
    """What `distcls models` lists without a pattern: the registered networks and `POPULAR`."""
    return (*_registered_names(), *POPULAR)


@functools.cache
def resolve(name: str) -> Origin:
    """Find a network: a registered one, torchvision's, timm's, or as `timm:NAME`,
    `torchvision:NAME` or, of the user's own, `module:attribute`.

    Raises UsageError for an unknown name, with the nearest known.
    """
    spec = ALIASES.get(name, name)
    library, colon, rest = spec.partition(":")
    if spec in NETWORKS:
        value = NETWORKS.find(spec).value
        theirs = rest if colon and _is_registered_in_timm(rest, value) else None
        return Origin("distcls", spec) if theirs is None else Origin("timm", theirs)
    if colon and library not in ("torchvision", "timm"):
        raise UsageError(
            f"model.name: unknown library {library!r} in {name!r} (choices: torchvision, timm)"
        )
    bare = rest if colon else spec
    if library != "timm" and bare in _torchvision_names():
        return Origin("torchvision", bare)
    if library != "torchvision" and (found := _in_timm(bare)) is not None:
        return Origin("timm", found)
    choices: Iterable[str] = known()
    if colon:
        choices = (f"{library}:{other}" for other in _library_names(library))
    hint = did_you_mean(name, choices)
    raise UsageError(f"model.name: unknown model {name!r}{hint}; `distcls models '*'` lists all")


def known() -> tuple[str, ...]:
    """All names: the listed ones, then torchvision's, then what timm adds.

    A name of timm's that torchvision has too carries its prefix, `timm:resnet50`.
    """
    return tuple(catalogue())


def catalogue() -> dict[str, Library]:
    """The library of each of the `known` names; no library is loaded for it."""
    torchvision, timm = _names_in("torchvision"), _names_in("timm")
    ours: dict[str, Library] = dict.fromkeys(_registered_names(), "distcls")
    for name in POPULAR:
        ours[name] = "timm" if name in ALIASES else "torchvision"
    for name in torchvision:
        ours.setdefault(name, "torchvision")
    taken = {*ours, *ALIASES}
    theirs = [f"timm:{name}" if name in taken else name for name in timm]
    return ours | dict.fromkeys(theirs, "timm")


def matching(pattern: str | None) -> dict[str, Library]:
    """The known names that match a glob, or that contain a text without wildcards, with their
    libraries. `timm:` and `torchvision:` before it choose the library.

    None stands for `listed()`. Raises UsageError if there are none.
    """
    every = catalogue()
    if pattern is None:
        return {name: every[name] for name in listed()}
    glob = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    prefix, colon, rest = pattern.partition(":")
    if colon and glob != pattern:
        glob = f"{prefix}:*{rest}*"
    found = {
        name: library
        for name, library in every.items()
        if fnmatch.fnmatchcase(name, glob)
        or fnmatch.fnmatchcase(f"{library}:{name.removeprefix('timm:')}", glob)
    }
    if not found:
        raise UsageError(f"pattern: no model matches {pattern!r}{did_you_mean(pattern, every)}")
    return found


_DEFINITION = re.compile(r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)", re.M)
"""How the files of torchvision and timm register a network."""
_OURS = re.compile(r"^@NETWORKS\.register\(\"([\w-]+)\"", re.M)


def _registered_names() -> tuple[str, ...]:
    """Those of `NETWORKS`, which loads torch only where modules of the user's register more."""
    home = Path(__file__).with_name("simple.py")
    if "distcls.models.simple" in sys.modules or os.environ.get(IMPORTS):
        return NETWORKS.names()
    return tuple(_OURS.findall(home.read_text(encoding="utf-8"))) or NETWORKS.names()


def _names_in(library: Literal["torchvision", "timm"]) -> tuple[str, ...]:
    """All names of a library: as it lists them, but read from its files while it is not loaded.

    Loading both takes seconds, reading their files a tenth of one.
    """
    spec = None if library in sys.modules else importlib.util.find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        return _library_names(library)
    files = sorted(Path(spec.submodule_search_locations[0], "models").glob("*.py"))
    found = [name for file in files for name in _DEFINITION.findall(file.read_text("utf-8"))]
    return tuple(sorted(found, key=_natural if library == "timm" else None)) or _library_names(
        library
    )


def _library_names(library: str) -> tuple[str, ...]:
    """All names of a library, which is loaded for it."""
    return _torchvision_names() if library == "torchvision" else _timm_names()


def _natural(name: str) -> list[int | str]:
    """A sort key: numbers by their value, as timm sorts its names."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


@functools.cache
def _torchvision_names() -> tuple[str, ...]:
    """Classifiers only: detection, segmentation, video and quantized ones live in other modules."""
    import torchvision

    return tuple(torchvision.models.list_models(module=torchvision.models))


def _timm_names() -> tuple[str, ...]:
    """Those that other modules have registered in timm so far included."""
    import timm

    import_modules(os.environ.get(IMPORTS, ""))
    return tuple(timm.list_models())


def _is_registered_by_user(name: str) -> bool:
    """Whether one of timm's names is of a module of the user's."""
    if "timm" not in sys.modules:
        return False
    from timm.models import model_entrypoint

    return str(model_entrypoint(name).__module__).partition(".")[0] != "timm"


def _is_registered_in_timm(name: str, value: Any) -> bool:
    """Whether `value` is what timm's own `register_model` has under that name."""
    if "timm" not in sys.modules:
        return False
    from timm.models import is_model, model_entrypoint

    return bool(is_model(name)) and model_entrypoint(name) is value


def recorded_name(name: str) -> str:
    """The name of a network that files hold: a user's own with its module (`Registry.recorded`),
    one that a module of the user's registered in timm as well."""
    origin = resolve(name)
    if origin.library == "distcls":
        return NETWORKS.recorded(name)
    if origin.library == "timm" and "." not in origin.name:
        from timm.models import model_entrypoint

        module: str = model_entrypoint(origin.name).__module__
        if module.partition(".")[0] != "timm":
            return f"{module}:{origin.name}"
    return name


def _in_timm(name: str) -> str | None:
    """timm's present name for it, or None. Raises UsageError for an unknown tag of weights."""
    from timm.models import get_arch_pretrained_cfgs, get_deprecated_models, is_model

    # an outdated name still works in timm, with a warning
    present: str | None = get_deprecated_models().get(name, name)
    architecture, _, tag = (present or "").partition(".")
    if not is_model(architecture):
        return None
    tagged = list(get_arch_pretrained_cfgs(architecture))
    if tag and present not in tagged:
        hint = did_you_mean(name, tagged)
        raise UsageError(f"model.name: timm's {architecture} has no weights {tag!r}{hint}")
    return present


def require_loaded(name: str, path: object) -> None:
    """Raise UsageError for a network of a model file whose code this process has not imported, or
    that no module holds.

    A file that names code does not get it imported, nor any function called that is not meant to
    make networks: it may come from anywhere.
    """
    allowed = os.environ.get(IMPORTS, "")
    import_modules(allowed)
    if not NETWORKS.is_import_path(name):
        return
    module, _, attribute = name.partition(":")
    if module == OBJECT and not NETWORKS.knows(name):
        raise UsageError(
            f"{path}: its network {NETWORKS.short(name)!r} was an object that another process gave "
            "to distcls.fit, which no file can hold: resume that run with it, or put it into a "
            f"module and set {IMPORTS}=MODULE; the exported best.onnx needs no code"
        )
    if module == MAIN and not NETWORKS.knows(name):
        raise UsageError(
            f"{path}: its network {attribute!r} was defined in a script or notebook: run its "
            f"definition first, or put it into a module and set {IMPORTS}=MODULE; the exported "
            "best.onnx needs no code"
        )
    value = getattr(sys.modules.get(module), attribute, None)
    trusted = module in {each.strip() for each in allowed.split(",")} or NETWORKS.knows(name)
    if not (trusted or _is_network_class(value)):
        raise UsageError(
            f"{path}: its network is {name}, code that is not part of distcls; if you trust it, "
            f"set {import_settings(module)}"
        )


def import_settings(module: str, *, path_stays: bool = True) -> str:
    """The environment variables, as a shell takes them, with which another command imports a
    module of the user's: `PYTHONPATH=. DISTCLS_IMPORT=hooks`. Nothing is imported for it.

    What is on the PYTHONPATH of this process needs no other one where that path stays."""
    top = module.partition(".")[0]
    setting = f"{IMPORTS}={module}"
    path = "" if path_stays else os.environ.get("PYTHONPATH", "")
    for entry in filter(None, path.split(os.pathsep)):
        if (Path(entry) / top).is_dir() or (Path(entry) / f"{top}.py").is_file():
            return f"PYTHONPATH={shlex.quote(entry)} {setting}"
    if top in sys.modules or importlib.util.find_spec(top) is not None:
        return setting
    here = Path(top).is_dir() or Path(f"{top}.py").is_file()
    return f"PYTHONPATH={'.' if here else 'FOLDER'} {setting}" + (
        "" if here else f", FOLDER being the one with {top}"
    )


def own_module(name: str) -> str | None:
    """The module of a network of the user's own, registered or not; None for one of the libraries
    and of distcls."""
    recorded = recorded_name(name)
    module = recorded.partition(":")[0]
    own = NETWORKS.is_import_path(recorded) and module.partition(".")[0] != PACKAGE
    return module if own else None


def _is_network_class(value: object) -> bool:
    from torch import nn

    return isinstance(value, type) and issubclass(value, nn.Module)
