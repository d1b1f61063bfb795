"""`python -m tests.reference > docs/api.md`: the reference of the public names, from their
docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import distcls
from distcls.config.schema import MISSING, describe, field_docs, leaves, sections
from distcls.evaluation.metrics import Metrics
from distcls.evaluation.outputs import Outputs
from distcls.export.certificate import Certificate
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.task import Head, Task
from distcls.training.config import TrainConfig

HEAD = """# API reference

What `import distcls` offers, by its docstrings (`python -m tests.reference > docs/api.md` writes
this page); [python.md](python.md) has the examples. N counts images, K classes. `NDArray[float32]`
is a NumPy array. Errors have the value and what to do in their text.
"""
GROUPS = {
    "Prediction": ("load", "Predictor", "Prediction", "Predictions"),
    "Data": ("open_dataset", "prepare_dataset", "ImageDataset", "Example"),
    "Training": ("fit", "TrainConfig", "TrainResult"),
    "Parts of your own": (
        *("register_model", "register_loss", "register_metric"),
        *("register_optimizer", "register_schedule"),
    ),
    "Evaluation": (
        *("evaluate_model", "EvaluationResult"),
        *("calibrate_model", "CalibrationResult"),
    ),
    "Explanation": ("explain",),
    "Export": ("export_onnx", "ExportResult"),
    "Errors": ("DistclsError", "UsageError", "BadValue", "BadImage", "Stopped"),
}
"""All public names."""
HELD = (Task, Head, ModelCard, Preprocess, Metrics, Outputs, Certificate)
"""The types of attributes of the public ones."""
COMMANDS_USE = {"chunks"}
"""Methods that only the commands call."""
WIDTH = 100


def page() -> str:
    """The page."""
    lines = [HEAD]
    for title, names in GROUPS.items():
        linked = (f"[`{name}`](#{name.lower()})" for name in names)
        lines.append(f"- {title}: {', '.join(linked)}")
    for title, names in GROUPS.items():
        lines.append(f"\n## {title}")
        for name in names:
            lines += entry(name, getattr(distcls, name))
    lines.append("\n## Types of their attributes")
    for cls in HELD:
        lines += [f"\n### {cls.__name__}\n", *prose(cls), "", *attributes(cls)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def entry(name: str, value: Any) -> Iterator[str]:
    """The section of a public name."""
    yield f"\n### {name}\n"
    if not inspect.isclass(value):
        yield from (code(f"distcls.{name}", value), "", *prose(value))
        return
    if issubclass(value, Exception):
        yield f"Exception, a kind of `{value.__base__.__name__}`.\n"
    if value is TrainConfig:
        yield "```python\ndistcls.TrainConfig(*, data, **keys)\n```\n"
    yield from (*prose(value), "")
    yield from keys() if value is TrainConfig else attributes(value)
    for own, function in methods(value):
        called = name.lower() if own == "__call__" else f"{name}.{own}"
        yield from (f"\n#### {name}.{own}\n", code(called, function), "", *prose(function))


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods of a class's own, as they are called, and `__call__`."""
    for name, member in vars(cls).items():
        function = inspect.unwrap(getattr(member, "__func__", member))
        public = name == "__call__" or not (name.startswith("_") or name in COMMANDS_USE)
        if inspect.isfunction(function) and public:
            yield name, function


def attributes(cls: type) -> Iterator[str]:
    """Fields, properties and the attributes that `__init__` describes, a line each."""
    docs = field_docs(cls) if dataclasses.is_dataclass(cls) else {}
    found = {name: (cls.__annotations__[name], text) for name, text in docs.items()}
    found |= {name: ("", text) for name, text in assigned(cls).items()}
    for name, member in vars(cls).items():
        if isinstance(member, property) and not name.startswith("_"):
            found[name] = (member.fget.__annotations__["return"], inspect.getdoc(member) or "")
    for name, (kind, text) in found.items():
        of_kind = f" (`{spelt(kind, cls.__module__)}`)" if kind else ""
        yield item(f"- **`{name}`**{of_kind}: {text}")


def assigned(cls: type) -> dict[str, str]:
    """What stands below the assignments to attributes in `__init__`."""
    if "__init__" not in vars(cls) or dataclasses.is_dataclass(cls):
        return {}
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.__init__)))  # type: ignore[misc]
    body = typing.cast(ast.FunctionDef, tree.body[0]).body
    return {
        node.targets[0].attr: below.value.value
        for node, below in itertools.pairwise(body)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
    }


def keys() -> Iterator[str]:
    """The keys of a training run, by sections."""
    about = sections(TrainConfig)
    for section, group in itertools.groupby(
        leaves(TrainConfig), lambda leaf: leaf.key.rpartition(".")[0]
    ):
        if section:
            yield f"\n**`{section}`**: {about[section]}\n"
        for leaf in group:
            default = "required" if leaf.default is MISSING else f"default {plain(leaf.default)}"
            yield item(f"- **`{leaf.key}`** ({describe(leaf.type)}; {default}): {leaf.doc}")


def plain(value: Any) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"`{value}`" if value != () else "none"


def item(text: str) -> str:
    """An item of a list, wrapped."""
    return textwrap.fill(
        " ".join(text.split()), WIDTH, subsequent_indent="  ", break_on_hyphens=False
    )


def spelt(annotation: str, module: str) -> str:
    """An annotation, the module's own short names of types written out."""

    def write_out(match: re.Match[str]) -> str:
        value = getattr(sys.modules[module], match[0], None)
        arguments = typing.get_args(value)
        if typing.get_origin(value) is np.ndarray:
            return f"NDArray[{typing.get_args(arguments[1])[0].__name__}]"
        if typing.get_origin(value) is typing.Literal:
            return f"Literal[{', '.join(map(repr, arguments))}]"
        return {"StrPath": "str | os.PathLike[str]", "Color": "tuple[int, int, int]"}.get(
            match[0], match[0]
        )

    return re.sub(r"\b[A-Z]\w+\b", write_out, annotation)


def code(name: str, function: Callable[..., Any]) -> str:
    """The signature, or those of the overloads, as a block of code."""
    found = typing.get_overloads(function) or [function]
    return "```python\n" + "\n".join(signature(name, each) for each in found) + "\n```"


def signature(name: str, function: Callable[..., Any]) -> str:
    """A function's signature without `self`, on several lines where it is long."""
    shown = inspect.signature(function)
    parts: list[str] = []
    kinds = [parameter.kind for parameter in shown.parameters.values()]
    for place, parameter in enumerate(shown.parameters.values()):
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.KEYWORD_ONLY not in kinds[:place]:
            parts.append("*")
        stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        kind = spelt(parameter.annotation, function.__module__)
        parts.append(f"{stars}{parameter.name}: {kind}{default}")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            parts.append("/")
    result = f" -> {spelt(shown.return_annotation, function.__module__)}"
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def prose(value: Any) -> Iterator[str]:
    """A docstring as Markdown: indented examples as code, `Args:` and `Raises:` as lists."""
    titles = {"Args:": "Parameters", "Returns:": "Returns", "Raises:": "Raises"}
    for block in re.split(r"\n\n+", inspect.getdoc(value) or ""):
        title, _, inside = block.partition("\n")
        if title in titles:
            yield f"**{titles[title]}**"
            words = textwrap.dedent(inside)
            if title == "Returns:":
                yield f"\n{words}\n"
                continue
            pairs = (each.partition(": ") for each in re.split(r"\n(?=\S)", words))
            yield from ("", *(item(f"- **`{name}`**: {text}") for name, _, text in pairs), "")
        elif block.startswith("    "):
            yield f"```python\n{textwrap.dedent(block)}\n```\n"
        else:
            yield f"{block}\n"


if __name__ == "__main__":
    print(page(), end="")
