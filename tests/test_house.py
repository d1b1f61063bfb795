"""The layers: imports go down, never up, never in a circle; some layers know no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import arrows, cycles, figures, folder, modules, reached

ROOT = Path(__file__).parent.parent
LAYERS = [
    "errors log cli registry",
    "stored",
    "files system config",
    "imaging task plotting page",
    "model_card",
    "data",
    "runtime models",
    "prediction",
    "predictor",
    "explanation",
    "evaluation batch serving",
    "training",
    "export launch audit",
    "report",
    "commands",
    "train evaluate __main__",
]
"""Folders and modules right below `distcls`, the lowest first; the aliases come last."""
HEIGHT = {f"distcls.{name}": at for at, row in enumerate(LAYERS) for name in row.split()} | {
    "export": len(LAYERS),
    "launch": len(LAYERS),
}
WITHOUT_TORCH = [
    "distcls.cli",
    "distcls.config",
    "distcls.registry",
    "distcls.imaging",
    "distcls.model_card",
    "distcls.stored",
    "distcls.data.prepare",
    "distcls.runtime.autotune",
    "distcls.runtime.generic_onnx",
    "distcls.predictor",
    "distcls.batch.job",
    "distcls.explanation.explain",
    "distcls.evaluation.evaluate",
    "distcls.report.report",
    "distcls.commands.audit",
    "distcls.commands.report",
    "distcls.commands.prepare",
    "distcls.commands.predict",
    "distcls.commands.serve",
    "distcls.serving.app",
    "distcls.serving.compute",
    "distcls.serving.grpc",
    "distcls.commands.evaluate",
    "distcls.commands.compare",
    "distcls.commands.calibrate",
    "distcls.commands.completion",
    "distcls.commands.models",
    "distcls.commands.train",
    "distcls.commands.shipped",
    "distcls.commands.show",
    "distcls.commands.cv",
    "distcls.commands.lr_find",
    "distcls.commands.merge",
    "distcls.commands.triton",
    "distcls.training.config",
    "distcls.training.schedule",
    "distcls.training.signals",
    "distcls.models.config",
    "distcls.models.registry",
    "launch.preflight",
    "launch.ray_train",
    "launch.search",
]
FILES = modules(ROOT)
GRAPH = arrows(FILES)


def test_every_folder_has_its_layer() -> None:
    assert {folder(module) for module in GRAPH} == HEIGHT.keys()


def test_imports_never_go_up() -> None:
    upwards = [
        f"{module} imports {name}, of a layer above"
        for module, names in GRAPH.items()
        for name in names
        if HEIGHT[folder(name)] > HEIGHT[folder(module)]
    ]
    assert not upwards


def test_no_folders_import_each_other() -> None:
    assert not cycles(GRAPH)


def test_imports_make_no_circle() -> None:
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for name in GRAPH[module]:
            visit(name, (*trail, module))
        done.add(module)

    for module in GRAPH:
        visit(module, ())


def test_nothing_imports_the_aliases() -> None:
    aliases = {"distcls.train", "distcls.evaluate", "distcls.__main__"}
    aliases |= {module for module in GRAPH if not module.startswith("distcls.")}
    named = {name for module, names in GRAPH.items() for name in names if module not in aliases}
    assert not named & aliases


def test_the_house_stays_as_it_is_divided() -> None:
    """The bounds that the layout was made for; a feature of its own may need them moved."""
    found = figures(ROOT)
    lengths = str(found["lines a function, median / p90 / max"]).split(" / ")
    assert int(lengths[1]) <= 25
    assert int(lengths[2]) <= 60
    per_thousand = found["arrows per 1,000 lines"]
    assert isinstance(per_thousand, float)
    assert per_thousand <= 36
    assert len(reached("distcls.commands.train", GRAPH)) <= 81
    assert len(reached("distcls.commands.predict", GRAPH)) <= 58


def test_these_need_no_torch() -> None:
    """In one process: a module that has been loaded hides nothing of another that needs torch."""
    program = (
        "import importlib, sys\n"
        "for name in ('torch', 'torchvision', 'accelerate'):\n"
        "    sys.modules[name] = None\n"
        f"for module in {WITHOUT_TORCH!r}:\n"
        "    try:\n"
        "        importlib.import_module(module)\n"
        "    except ImportError as error:\n"
        "        print(f'{module}: {error}')\n"
    )
    call = [sys.executable, "-c", program]
    done = subprocess.run(call, check=True, cwd=ROOT, capture_output=True, text=True)
    assert not done.stdout


@pytest.mark.parametrize("command", [["--help"], ["help"], ["--version"], ["-V"]])
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
