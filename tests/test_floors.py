"""The rooms and their floors: imports go down or along, never up, and some rooms know no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "distcls": 0,
    "distcls.errors": 0,
    "distcls.log": 0,
    "distcls.files": 0,
    "distcls.cores": 0,
    "distcls.config": 1,
    "distcls.imaging": 1,
    "distcls.bundle": 1,
    "distcls.targets": 1,
    "distcls.figures": 1,
    "distcls.data": 2,
    "distcls.models": 2,
    "distcls.inference": 2,
    "distcls.evaluation": 3,
    "distcls.training": 3,
    "distcls.opening": 3,
    "distcls.door": 0,
    "distcls.cli": 4,
    "distcls.prepare": 4,
    "distcls.train": 4,
    "distcls.evaluate": 4,
    "distcls.list_models": 4,
    "distcls.show": 4,
    "distcls.predict": 4,
    "export": 4,
    "launch": 4,
    "benchmarks": 5,
}
WITHOUT_TORCH = [
    "distcls.cli",
    "distcls.config",
    "distcls.imaging",
    "distcls.bundle",
    "distcls.data.prepare",
    "distcls.inference.foreign",
    "distcls.inference.predict",
    "distcls.evaluation.evaluate",
    "distcls.prepare",
    "distcls.predict",
    "distcls.evaluate",
    "distcls.list_models",
    "distcls.training.config",
    "distcls.train",
    "distcls.show",
    "launch.preflight",
    "launch.ray_train",
    "launch.search",
]


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = {}
    for room in ("distcls", "export", "launch", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names of the project's modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return {name for name in names if name in MODULES}


MODULES = modules()


def floor(module: str) -> int:
    """Floor of the room that a module lies in."""
    parts = module.split(".")
    room = ".".join(parts[:2]) if parts[0] == "distcls" else parts[0]
    assert room in FLOORS, f"{room} has no floor yet; give it one in {__file__}"
    return FLOORS[room]


def test_imports_never_go_up() -> None:
    upwards = [
        f"{module} (floor {floor(module)}) imports {name} (floor {floor(name)})"
        for module, path in MODULES.items()
        for name in imports(path)
        if floor(name) > floor(module)
    ]
    assert not upwards


def test_imports_make_no_circle() -> None:
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    graph = {module: imports(path) - packages for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for name in graph[module]:
            visit(name, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_room_needs_no_torch(module: str) -> None:
    program = (
        f"import sys; sys.modules['torch'] = None; sys.modules['torchvision'] = None; "
        f"sys.modules['accelerate'] = None; import {module}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("command", [["--help"], ["--version"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    program = (
        "import sys\n"
        "from distcls.cli import dispatch\n"
        f"dispatch({command!r})\n"
        "heavy = {'torch', 'numpy', 'cv2', 'pyarrow', 'onnxruntime', 'yaml', 'matplotlib', 'PIL'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)
