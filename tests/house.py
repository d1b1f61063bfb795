"""`python -m tests.house [ROOT]`: how the code is divided, in figures: files, functions, imports.

An arrow is one module of ours that imports another of ours, wherever the import stands; packages'
`__init__.py` are no files of their own, an import of a package means what its `__init__.py` imports
a name from. Arrows are counted on 1,000 lines of code, without blanks, comments and docstrings. A
folder is what stands below `distcls/` (or `export`, `launch`, the thin aliases).
"""

from __future__ import annotations

import ast
import functools
import io
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOTS = ("distcls", "export", "launch")

Arrows = dict[str, set[str]]
"""By module: the modules that it imports."""


def modules(root: Path) -> dict[str, Path]:
    """All modules of ours, packages' own files included, by dotted name."""
    found = {}
    for top in ROOTS:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(files: dict[str, Path]) -> Arrows:
    """Who imports whom; an import of a package is followed to where its name is defined."""
    exported = {name: _exports(name, path) for name, path in files.items() if _is_package(path)}
    found: Arrows = {}
    for name, path in files.items():
        if _is_package(path):
            continue
        wanted = {_origin(*pair, files, exported) for pair in _imported(path)}
        found[name] = {module for module in wanted if module and module != name}
    return found


def reached(start: str, graph: Arrows) -> set[str]:
    """All modules that importing `start`, and calling what it imports later, may load."""
    seen, waiting = {start}, [start]
    while waiting:
        for module in graph.get(waiting.pop(), ()):
            if module not in seen:
                seen.add(module)
                waiting.append(module)
    return seen


def folder(module: str) -> str:
    """The folder a module stands in; a module right below `distcls` is one of its own."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "distcls" else parts[0]


def cycles(graph: Arrows) -> list[tuple[str, str]]:
    """Pairs of folders that import each other, directly or by way of others."""
    between: Arrows = {}
    for module, targets in graph.items():
        own = folder(module)
        between.setdefault(own, set()).update({folder(other) for other in targets} - {own})
    reach = {name: reached(name, between) for name in between}
    names = sorted(between)
    return [(a, b) for a in names for b in names if a < b and b in reach[a] and a in reach[b]]


def function_lengths(files: Iterable[Path]) -> list[int]:
    """Lines of every function and method, decorators left out."""
    return [
        (node.end_lineno or 0) - node.lineno + 1
        for path in files
        for node in _nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


@functools.cache
def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, *layout):
            found.update(range(token.start[0], token.end[0] + 1))
    for node in _nodes(path):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            found.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(found)


def figures(root: Path) -> dict[str, object]:
    """The figures of a checkout."""
    files = modules(root)
    plain = {name: path for name, path in files.items() if not _is_package(path)}
    graph = arrows(files)
    lengths = sorted(path.read_text(encoding="utf-8").count("\n") for path in plain.values())
    functions = sorted(function_lengths(plain.values()))
    count = sum(map(len, graph.values()))
    code = sum(map(code_lines, plain.values()))
    starts = {
        "train": ("distcls.commands.train", "distcls.train"),
        "predict": ("distcls.commands.predict", "distcls.predict"),
    }
    return {
        "files": len(plain),
        "lines": sum(lengths),
        "lines of code": code,
        "lines a file, median / p90 / max": _spread(lengths),
        "functions": len(functions),
        "lines a function, median / p90 / max": _spread(functions),
        "arrows": count,
        "arrows per 1,000 lines": round(1000 * count / code, 1),
        **{
            f"files reached from {name}": len(
                reached(next(s for s in choices if s in plain), graph)
            )
            for name, choices in starts.items()
        },
        "cycles between folders": cycles(graph),
    }


def _spread(values: list[int]) -> str:
    p90 = values[min(len(values) - 1, round(0.9 * len(values)))]
    return f"{statistics.median(values):g} / {p90} / {values[-1]}"


def _is_package(path: Path) -> bool:
    return path.name == "__init__.py"


def _imported(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each import of ours: the module, and the name taken from it."""
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def _exports(package: str, path: Path) -> dict[str, str]:
    """Where the names come from that a package's own file imports."""
    return {name: module for module, name in _imported(path) if name is not None}


def _origin(
    module: str, name: str | None, files: dict[str, Path], exported: dict[str, dict[str, str]]
) -> str | None:
    """The module of ours that an import means; None if it is none, or a package's own name."""
    if name is not None and f"{module}.{name}" in files:
        module = f"{module}.{name}"
    elif name is not None and module in exported:
        module = exported[module].get(name, module)
    return module if module in files and module not in exported else None


if __name__ == "__main__":
    for key, value in figures(Path(sys.argv[1] if sys.argv[1:] else ".")).items():
        print(f"{key:<40} {value}")
