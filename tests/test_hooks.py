"""What a user plugs in without editing our files: exact when killed and resumed, on one process and
on two; kept by export, evaluation and prediction; and one line for each mistake."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models import register_model as register_in_timm
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

import distcls
from distcls.data.dataset import Dataset
from distcls.errors import UsageError
from distcls.evaluation.metrics import METRICS, metric_state
from distcls.models.checkpoint import load_tensors
from distcls.models.registry import NETWORKS, recorded_name, require_loaded, resolve
from distcls.registry import IMPORTS, _objects, _token, reference
from distcls.task import Task
from distcls.training.config import LOSSES, OPTIMIZERS, AugmentConfig, OptimizerConfig
from distcls.training.hooks import (
    BatchTransform,
    ImageTransform,
    _SeededDraws,
    make_transforms,
)
from distcls.training.optim import make_optimizer
from distcls.training.sampler import seeds
from distcls.training.schedule import SCHEDULES
from tests.conftest import registered_here
from tests.e2e.commands import run
from tests.faults.survival import (
    ONE_AND_TWO,
    assert_bit_equal,
    end_all,
    finish,
    kill_all,
    start,
    steps_done,
    wait_for,
)

REGISTRIES = (NETWORKS, LOSSES, OPTIMIZERS, SCHEDULES, METRICS)
with registered_here():  # not for all tests that are collected with these
    from tests import own_hooks

    REGISTERED = [
        (registry, {name: entry for name, entry in registry._entries.items() if entry.own})
        for registry in REGISTRIES
    ]
HERE = "tests.own_hooks"
OWN = [
    *("--model.name", f"{HERE}:own-net", "--loss.name", f"{HERE}:loss", "--epochs", "3"),
    *("--loss.label-smoothing", "0", "--monitor.metric", f"{HERE}:brier"),
    *("--augment.transform", f"{HERE}:transform", "--callbacks", f"{HERE}:Diary"),
]
"""Beside the options of `tests.faults.survival`, of 7 steps per epoch."""


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """What a test registers is gone after it; what `own_hooks` registers is there."""
    with registered_here():
        for registry, entries in REGISTERED:
            registry._entries |= entries
        yield


def diary(out: Path) -> list[str]:
    return (out / "diary").read_text().splitlines()


@pytest.mark.parametrize("processes", ONE_AND_TWO)
def test_killed_and_resumed_it_is_the_unbroken_run(
    processes: int, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, out = tmp_path / "unbroken", tmp_path / "run"
    first = finish(start(digits, reference, *OWN, processes=processes))
    process = start(digits, out, *OWN, processes=processes, SLOW="0.1")
    wait_for(lambda: steps_done(out) >= 10, process)
    kill_all(process)
    assert 10 <= steps_done(out) < 14
    finish(start(digits, out, *OWN, processes=processes))
    assert_bit_equal(reference, out)
    assert diary(reference)[0] == "start 0 3"
    assert diary(reference)[-1].startswith("end 2 ")  # it asked to stop after two epochs of three
    assert [line for line in diary(out) if line.startswith("epoch")] == diary(reference)[1:-1]
    said = finish(start(digits, out, *OWN, processes=processes))
    assert "(spare.weight, spare.bias) get no gradient and are not trained" in first
    assert f"the callback {HERE}:Diary stopped it after epoch 2 of 3" in said
    agrees_everywhere(out, digits, monkeypatch)


def agrees_everywhere(out: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint and the exported file, evaluated and in predictions."""
    with (out / "history.csv").open(newline="") as handle:
        scores = [float(row["val_brier"]) for row in csv.DictReader(handle)]
    evaluate = ("evaluate", "--data", digits, "--split", "val", "--limit", 1000, "--json")
    refused = run(*evaluate, "--model", out / "best.pth", code=2).stderr
    assert f"set {IMPORTS}={HERE}" in refused
    assert len(refused.splitlines()) == 1
    assert f"set {IMPORTS}={HERE}" in run("export", "--ckpt", out, code=2).stderr
    monkeypatch.setenv(IMPORTS, HERE)
    found = json.loads(run(*evaluate, "--model", out / "best.pth").stdout)
    assert found["count"] == len(Dataset.open(digits).split("val"))
    run("export", "--ckpt", out)
    monkeypatch.delenv(IMPORTS)
    exported = json.loads(run(*evaluate, "--model", out / "best.onnx").stdout)
    assert exported["top1"] == found["top1"]
    assert found["brier"] == pytest.approx(min(scores), rel=1e-5)
    split = Dataset.open(digits).split("test")
    with distcls.load(out / "best.onnx", provider="cpu") as predictor:
        rows = list(predictor.stream(str(digits)))
    labels = [split.task.classes.index(str(row.label)) for row in rows]
    tested = run("evaluate", "--data", digits, "--model", out / "best.onnx", "--json").stdout
    assert json.loads(tested)["top1"] == pytest.approx(np.mean(labels == split.labels))


SMALL: dict[str, Any] = {"epochs": 2, "limit": 60, "batch_size": 20, "quiet": True}
OBJECTS: dict[str, Any] = {
    "model": own_hooks.Linear,
    "loss": own_hooks.loss,
    "monitor": {"metric": own_hooks.brier},
    "optimizer": own_hooks.optimizer,
    "schedule": own_hooks.schedule,
    "augment": {"flip": 0.5},
}


def weights(out: Path) -> list[torch.Tensor]:
    return list(load_tensors(out / "best.pth")["model"].values())


def test_objects_twice_in_one_process(digits: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def note(run: Any, metrics: dict[str, float]) -> None:
        seen.append(run.epoch)

    plain = distcls.fit(data=digits, out=tmp_path / "0", model="simple_cnn", **SMALL)
    runs = []
    for number in (1, 2):
        transform = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomErasing(p=1)])
        runs.append(
            distcls.fit(
                data=digits,
                out=tmp_path / str(number),
                transform=transform,
                callbacks=[own_hooks.Diary(), note],
                **{**SMALL, **OBJECTS},
            )
        )
    assert seen == [1, 1]  # the diary asks for the end
    assert all(map(torch.equal, weights(runs[0].out), weights(runs[1].out)))
    assert runs[0].load().classes == plain.load().classes
    text = (tmp_path / "1" / "config.yaml").read_text()
    # what a module holds is named by it, what none does has to be given again
    names = ("Linear", "loss", "optimizer", "schedule")
    assert all(f"name: {HERE}:{name}" in text for name in names)
    assert "transform: object:Compose-" in text
    again = {"data": digits, "out": tmp_path / "1", "resume": "auto", **SMALL, **OBJECTS}
    with pytest.raises(UsageError, match=r"augment\.transform: None given, but .* 'object:C"):
        distcls.fit(**again, callbacks=[note])
    more = distcls.fit(**again, transform=transform, callbacks=[note])
    assert (more.epochs, seen) == (2, [1, 1, 2])
    _objects.clear()
    config = distcls.TrainConfig.from_yaml(tmp_path / "1" / "config.yaml")
    with pytest.raises(
        UsageError, match=r"'object:Compose-\w{8}(-\d)?' was an object given to distcls\.fit"
    ):
        distcls.fit(config)


def test_names_that_files_hold() -> None:
    """Of a user's own with its module; a later process finds it by that, or is told."""
    assert LOSSES.recorded("own-loss") == f"{HERE}:own-loss"
    assert LOSSES.recorded("focal") == "focal"
    assert recorded_name("own-net") == f"{HERE}:own-net"
    assert recorded_name("resnet18") == "resnet18"
    for name in ("own-loss", f"{HERE}:own-loss", f"{HERE}:loss"):
        assert LOSSES.find(name).value is own_hooks.loss
    assert METRICS.short(f"{HERE}:brier") == "brier"
    assert METRICS.short("somewhere:top1") == "somewhere:top1"
    with pytest.raises(UsageError, match="loss 'focal' is registered by distcls; choose another"):
        distcls.register_loss("focal")(own_hooks.loss)
    distcls.register_loss("odd", label_smothing=0.1)(lambda logits, targets: logits)
    with pytest.raises(UsageError, match="is no key of loss; did you mean 'label_smoothing'"):
        distcls.fit(data="digits", loss="odd")


def test_names_that_cannot_be_registered() -> None:
    decorators: dict[str, Any] = {
        "model": distcls.register_model,
        "loss": distcls.register_loss,
        "metric": distcls.register_metric,
        "optimizer": distcls.register_optimizer,
        "schedule": distcls.register_schedule,
    }
    for name, decorator in decorators.items():
        for wrong in (own_hooks.loss, "", " ", "a name", "hooks:mine", ":", None, 3):
            with pytest.raises(UsageError, match=f"^@distcls.register_{name}: ") as caught:
                decorator(wrong)
            assert f'as in @distcls.register_{name}("mine")' in str(caught.value)
    for name, noun, library in (
        ("resnet18", "model", "torchvision"),
        ("vit_tiny_patch16_224", "model", "timm"),
        ("resnet50.a1_in1k", "model", "torchvision"),
        ("xception", "model", "timm"),
        ("lamb", "optimizer", "timm"),
    ):
        with pytest.raises(UsageError, match=f"{name!r} is a name of {library}'s, by which it"):
            decorators[noun](name)(own_hooks.loss)
    with pytest.raises(UsageError, match="model 'simple_cnn' is registered by distcls"):
        distcls.register_model("simple_cnn")(own_hooks.Linear)


CELL = "def twice(logits, targets):\n    return logits.sum(1) * {}\n"


def test_a_name_registered_again() -> None:
    """By the same definition, as in a cell of a notebook that is run again; never by another."""

    def cell(number: int) -> Any:
        variables: dict[str, Any] = {"__name__": "__main__"}
        exec(CELL.format(number), variables)
        return variables["twice"]

    def within(factor: int) -> Any:
        return lambda logits, targets: logits.sum(1) * factor

    def by_default(factor: int) -> Any:
        return lambda logits, targets, factor=factor: logits.sum(1) * factor

    register = distcls.register_loss("mine")
    register(cell(2))
    register(again := cell(3))
    assert LOSSES.find("mine").value is again
    pairs: tuple[tuple[Any, Any], ...] = (
        (cell(2), own_hooks.loss),
        (lambda logits, targets: logits.sum(1), lambda logits, targets: logits.mean(1)),
        (within(2), within(3)),
        (by_default(2), by_default(3)),
        (partial(own_hooks.loss, factor=2), partial(own_hooks.loss, factor=3)),
        (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.2)),
    )
    for number, (one, other) in enumerate(pairs):
        register = distcls.register_loss(f"mine{number}")
        register(one)
        register(one)
        with pytest.raises(UsageError, match=f"'mine{number}' is registered already: .*another"):
            register(other)
    distcls.register_loss("mine2")(within(2))
    distcls.register_loss("mine5")(nn.CrossEntropyLoss(label_smoothing=0.1))


def test_a_network_registered_in_timm(digits: Path, tmp_path: Path) -> None:
    def own_timm_net(pretrained: bool = False, **options: Any) -> nn.Module:
        return own_hooks.Linear(options["num_classes"], (28, 28))

    own_timm_net.__module__ = HERE
    register_in_timm(own_timm_net)
    own_hooks.own_timm_net = own_timm_net  # type: ignore[attr-defined]
    try:
        assert timm.is_model("own_timm_net")
        found = distcls.fit(data=digits, out=tmp_path, model="timm:own_timm_net", **SMALL)
        assert f"name: {HERE}:own_timm_net" in (tmp_path / "config.yaml").read_text()
        assert resolve(f"{HERE}:own_timm_net") == ("timm", "own_timm_net")
        assert found.load().classes == tuple("0123456789")
    finally:
        timm.models._registry._model_entrypoints.pop("own_timm_net")


def test_a_model_file_gets_no_code_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("os:system", "subprocess:Popen", "trap_module:Net", "shutil:rmtree"):
        with pytest.raises(UsageError, match=f"set {IMPORTS}=") as caught:
            require_loaded(name, "best.pth")
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="was defined in a script or notebook: run its def"):
        require_loaded("__main__:main", "best.pth")
    for name in ("object:Net", "object:lambda-0123abcd"):
        with pytest.raises(UsageError, match="was an object that another process gave"):
            require_loaded(name, "best.pth")
    require_loaded(f"{HERE}:own-net", "best.pth")
    require_loaded(f"{HERE}:Linear", "best.pth")
    require_loaded("__main__:own-net", "best.pth")  # it has moved into a module


def test_a_function_of_a_script_is_taken_though_its_name_is_one_of_ours(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(*_: object) -> None:
        raise RuntimeError("the user's own was called")

    main = sys.modules["__main__"]
    parts = {"loss": "focal", "model": "simple_cnn", "schedule": "cosine", "optimizer": "adamw"}
    for key, name in {**parts, "monitor": "top1"}.items():
        monkeypatch.setattr(own, "__module__", "__main__")
        monkeypatch.setattr(own, "__qualname__", name)
        monkeypatch.setattr(main, name, own, raising=False)
        value = {"metric": own} if key == "monitor" else own
        options = {**SMALL, "model": "simple_nn", key: value}
        with pytest.raises((RuntimeError, UsageError), match="the user's own was called"):
            distcls.fit(data=digits, out=tmp_path / key, **options)


@pytest.mark.slow
def test_a_script_and_what_other_processes_say_of_its_model(digits: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import distcls\n"
        "from torch import nn\n"
        "@distcls.register_model('here')\n"
        "def make(classes, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * size[0] * size[1], classes))\n"
        "if sys.argv[1:]:\n"
        f"    distcls.fit(data={str(digits)!r}, out='run', model='here', epochs=1, limit=60)\n"
        "print(distcls.load('run').classes[3])\n"
    )
    python = [sys.executable, str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for arguments in (["train"], []):
        done = subprocess.run(
            [*python, *arguments],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
        assert ("this script or notebook alone has what model.name" in done.stderr) is bool(
            arguments
        )
    said = run("export", "--ckpt", tmp_path / "run", code=2).stderr
    assert "its network 'here' was defined in a script or notebook" in said
    assert len(said.splitlines()) == 1


def test_another_lambda_opens_no_file(digits: Path, tmp_path: Path) -> None:
    """Of the same number in another process; given again to the run, it opens what that wrote."""

    def lambdas() -> tuple[Any, Any]:
        return (
            lambda classes: own_hooks.Linear(classes, (28, 28)),
            lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, classes)),
        )

    def fit_it(out: str, model: Any, **more: Any) -> Any:
        return distcls.fit(data=digits, out=tmp_path / out, model=model, **{**SMALL, **more})

    def as_another_process() -> None:
        _objects.clear()
        NETWORKS._found.clear()
        resolve.cache_clear()
        _token.cache_clear()

    assert fit_it("a", lambdas()[0]).load().classes[3] == "3"
    as_another_process()
    fit_it("b", lambdas()[1])
    for work in (
        lambda: distcls.load(tmp_path / "a"),
        lambda: distcls.evaluate_model(tmp_path / "a", digits),
        lambda: distcls.export_onnx(tmp_path / "a"),
    ):
        with pytest.raises(UsageError, match="'lambda' was an object that another process") as said:
            work()
        assert "\n" not in str(said.value)
    as_another_process()
    written = (tmp_path / "a" / "best.pth").read_bytes()
    again = fit_it("a", lambdas()[0], resume="auto", epochs=3)
    (tmp_path / "a" / "best.pth").write_bytes(written)  # of the name that the first one gave it
    assert again.load().classes[3] == "3"


IMAGE = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
MANY = np.arange(40)


@pytest.mark.parametrize(
    "draw",
    [
        lambda ones: ones.bernoulli_(0.3),
        lambda ones: F.dropout(ones, 0.5),
        lambda ones: torch.normal(0.0, ones),
        lambda ones: torch.normal(ones, ones),
        torch.randn_like,
        lambda ones: torch.multinomial(ones, 3),
        lambda ones: torch.randperm(ones.numel()),
    ],
)
def test_random_operations_of_torch_follow_the_seed(draw: Callable[[Tensor], Tensor]) -> None:
    found = []
    for seed in (1, 1, 2):
        with _SeededDraws(seed):
            found.append(draw(torch.ones(8, 8)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "name", [f"{HERE}:transform", f"{HERE}:of_torchvision", "tests.plain_hooks:noise"]
)
def test_a_transform_of_an_image_follows_its_seed(name: str) -> None:
    """In any thread and any order; and nobody else's random numbers move."""
    made, none = make_transforms(AugmentConfig(transform=name))
    assert isinstance(made, ImageTransform)
    assert none is None
    before = torch.get_rng_state()
    alone = [made(IMAGE, seed) for seed in MANY.tolist()]
    made.try_on(IMAGE)
    assert torch.equal(before, torch.get_rng_state())
    assert len({image.tobytes() for image in alone}) > 10
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: made(IMAGE, int(seed)), MANY[::-1]))
    for one, other in zip(alone, together[::-1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_seeds_are_of_the_image() -> None:
    assert len({*seeds(0, 0, MANY).tolist(), *seeds(0, 1, MANY).tolist()}) == 80
    np.testing.assert_array_equal(seeds(0, 3, MANY)[5:7], seeds(0, 3, MANY[5:7]))
    assert seeds(1, 3, MANY)[0] != seeds(0, 3, MANY)[0]


def test_a_transform_of_a_batch() -> None:
    none, made = make_transforms(AugmentConfig(transform="tests.plain_hooks:Shade"))
    assert isinstance(made, BatchTransform)
    assert none is None
    made.try_on((8, 8), torch.device("cpu"))
    images = torch.full((2, 4, 4, 3), 200, dtype=torch.uint8)
    found = made(images, torch.tensor([[0.5], [0.0]]))
    assert found.unique().tolist() == [0, 100]


def counting() -> Any:
    calls = iter(range(10**6))
    return lambda image, rng: np.roll(image, next(calls), axis=1)


class OfTheBatch:
    draws = 0

    def __call__(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        return images - images.amin().to(torch.uint8) + images[:1]


WRONG_TRANSFORMS: dict[str, tuple[Any, str]] = {
    "float": (lambda image, rng: image / 255, r"float64 \[16, 20, 3\].*leave out Normalize"),
    "of torch": (v2.ToDtype(torch.float32), r"returned float32 \[3, 16, 20\].*leave out Normalize"),
    "another size": (v2.RandomCrop(8), r"returned uint8 \[8, 8, 3\].*\[16, 20, 3\].*resized_crop"),
    "nothing": (lambda image, rng: None, "a value None, expected uint8"),
    "one argument": (lambda image: image, r"takes 1 argument\(s\), expected \(image, rng\)"),
    "no function": ("text", "cannot be called"),
    "numpy's": (lambda image, rng: image + np.uint8(np.random.randint(9)), "global random numbers"),
    "a memory": (counting(), "other pixels for the same image and random numbers"),
    "draws": (type("Few", (), {"draws": -1, "__call__": print})(), "has draws -1"),
}


@pytest.mark.parametrize("name", WRONG_TRANSFORMS)
def test_a_wrong_transform_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, why = WRONG_TRANSFORMS[name]
    monkeypatch.setattr(own_hooks, "wrong", value, raising=False)

    def call() -> None:
        made, _ = make_transforms(AugmentConfig(transform=f"{HERE}:wrong"))
        assert made is not None
        made.try_on(IMAGE)

    with pytest.raises(UsageError, match=rf"augment\.transform: {HERE}:wrong .*{why}") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_batch_is_no_argument_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    made = BatchTransform("wrong", OfTheBatch())
    with pytest.raises(UsageError, match="gives an image other pixels alone than in a batch"):
        made.try_on((8, 8), torch.device("cpu"))
    made._value = lambda images, draws: images / 2
    with pytest.raises(UsageError, match=r"wrong returned float32 .*leave out Normalize"):
        made.try_on((8, 8), torch.device("cpu"))


class NeedsClosure(torch.optim.Optimizer):
    """One that says so in its step, as those of Sharpness-Aware Minimization do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        assert closure is not None, "a closure is required"


def of_own_groups(groups: Any, lr: float, config: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for group in groups for p in group["params"]], lr=lr)


class SevenLogits(own_hooks.Linear):
    def __init__(self, classes: int, size: tuple[int, int]) -> None:
        super().__init__(7, size)


class TwoInTraining(own_hooks.Linear):
    def forward(self, pixels: Tensor) -> Any:
        logits = super().forward(pixels)
        return (logits, logits) if self.training else logits


class Detached(own_hooks.Linear):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels).detach()


class WithoutParameters(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()


class Misspelt:
    def on_epoch_ends(self, run: Any, metrics: Any) -> None:
        pass


class WithArguments:
    def __init__(self, score: float) -> None:
        pass

    def on_epoch_end(self, run: Any, metrics: Any) -> None:
        pass


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a loss that is a scalar": (
        {"loss": nn.CrossEntropyLoss()},
        r"loss.name: object:CrossEntropyLoss.* returned the shape \[\] .*reduction='none'",
    ),
    "a loss that is none": (
        {"loss": lambda logits, targets: 0.5},
        "loss.name: .* returned a value of the type float, expected the loss of each image",
    ),
    "a loss of counts": (
        {"loss": lambda logits, targets: logits.argmax(1) - targets},
        "returned torch.int64, expected the loss of each image",
    ),
    "a loss without a gradient": (
        {"loss": lambda logits, targets: logits.detach().sum(1)},
        "does not depend on the logits",
    ),
    "a loss of three": ({"loss": lambda logits, targets, more: logits}, "takes 3 arguments"),
    "a loss that is trained": (
        {"loss": nn.Bilinear(10, 10, 1)},
        "has parameters, which nothing trains",
    ),
    "an option that is not read": (
        {"loss": {"name": own_hooks.loss, "label_smoothing": 0.1}},
        "loss.label_smoothing: 0.1 given, but .* takes logits and targets alone",
    ),
    "a metric that is no number": (
        {"monitor": {"metric": lambda metrics: "good"}},
        "metric: object:lambda.* returned 'good', expected a number",
    ),
    "a metric of each class": (
        {"monitor": {"metric": lambda metrics: metrics.f1}},
        "returned a value of the type ndarray, expected a number",
    ),
    "a metric of an image that is a mean": (
        {"monitor": {"metric": lambda logits, labels: 0.5}},
        r"returned float64 \[\] for 4 images, expected a number for each",
    ),
    "a metric that there is none of": (
        {"monitor": {"metric": lambda metrics: None}},
        "monitor.metric: object:lambda.* is None for",
    ),
    "an unknown metric": (
        {"monitor": {"metric": "macrof1"}},
        "monitor.metric: 'macrof1' is not valid.* did you mean 'macro_f1'",
    ),
    "an unknown module": ({"loss": "nowhere_at_all:poly"}, "no module 'nowhere_at_all'"),
    "an unknown attribute": (
        {"callbacks": [f"{HERE}:Diry"]},
        "has no 'Diry'; did you mean 'Diary'",
    ),
    "a network that exists already": (
        {"model": own_hooks.Linear(10, (8, 8))},
        r"model.name: object:Linear-\w{8} is of the type Linear; expected a class, or a function",
    ),
    "a network that is none": (
        {"model": lambda classes: classes},
        "returned a value of the type int",
    ),
    "a network of two": ({"model": lambda one, two: one}, "cannot be called with the number of"),
    "an optimiser that is none": (
        {"optimizer": lambda groups, lr, config: None},
        "optimizer.name: .* returned a value None, expected a torch.optim.Optimizer",
    ),
    "a schedule that is none": (
        {"schedule": lambda step, total: -1},
        "schedule.name: .* returned -1 for step 0, expected a finite number of 0 or more",
    ),
    "a schedule that is wrong at its end": (
        {"schedule": lambda step, total: 1.0 if step + 1 < total else float("nan"), "limit": 60},
        "schedule.name: .* returned nan for step 2, expected a finite number",
    ),
    "a schedule of words": ({"schedule": lambda step, total: "0.1"}, "returned '0.1' for step 0"),
    "a schedule of the step alone": (
        {"schedule": lambda step: 1.0},
        r"cannot be called with \(step, total_steps\): too many",
    ),
    "a schedule of torch's": (
        {"schedule": torch.optim.lr_scheduler.StepLR},
        "schedule.name: .* is the class StepLR, expected a function of",
    ),
    "an optimiser with a closure": (
        {"optimizer": torch.optim.LBFGS},
        "optimizer.name: .*LBFGS needs a closure, which computes the loss several times",
    ),
    "an optimiser with a closure of its own": (
        {"optimizer": NeedsClosure},
        r"cannot take a step: AssertionError: a closure is required \(test_hooks.py, line \d+\)",
    ),
    "an optimiser of sparse gradients": (
        {"optimizer": torch.optim.SparseAdam},
        "SparseAdam cannot take a step: RuntimeError: SparseAdam does not support dense gradients",
    ),
    "an optimiser of matrices": (
        {"optimizer": torch.optim.Muon},
        "Muon cannot be made: ValueError: Muon only supports 2D parameters",
    ),
    "an optimiser with groups of its own": (
        {"optimizer": of_own_groups},
        "optimizer.name: .*of_own_groups has parameter groups of its own, without lr_scale",
    ),
    "an optimiser of one": (
        {"optimizer": lambda params: None},
        r"cannot be called with \(params, lr\): too many positional arguments",
    ),
    "a network without parameters": (
        {"model": WithoutParameters},
        "model.name: .*WithoutParameters has no parameters, so there is nothing to train",
    ),
    "a network of seven logits": (
        {"model": SevenLogits},
        r"model.name: .*SevenLogits: its output for one image has the shape \[1, 7\], expected "
        r"\[1, 10\]: a logit for each of the 10 classes",
    ),
    "a network of two outputs in training": (
        {"model": TwoInTraining},
        r"TwoInTraining: in training mode its output for two images is tuple, expected \(2, 10\)",
    ),
    "a network that is detached": (
        {"model": Detached},
        "Detached: its output does not depend on its parameters: it is detached",
    ),
    "a transform that is a number": (
        {"transform": 5},
        "augment.transform: '5' is not valid, expected module:attribute",
    ),
    "a transform that is a list": ({"transform": [print]}, r"augment.transform: \[<built-in"),
    "no loss": ({"loss": None}, "loss: None is not valid: 'loss' is a section with the keys"),
    "a callback of another name": ({"callbacks": [Misspelt()]}, "'on_epoch_ends'; did you mean"),
    "a callback with arguments": (
        {"callbacks": [WithArguments]},
        "is a class that takes arguments",
    ),
    "a callback that is none": (
        {"callbacks": ["tests.plain_hooks:LARGE"]},
        "is of the type float, expected an",
    ),
    "a callback of one": (
        {"callbacks": [lambda run: None]},
        r"takes 1 .*expected \(run, metrics\)",
    ),
    "a callback that returns a score": (
        {"callbacks": [lambda run, metrics: metrics["val_top1"]]},
        "callbacks: on_epoch_end of object:lambda.* returned 0.* expected True to stop the run",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, digits: Path, tmp_path: Path) -> None:
    keys, why = MISTAKES[name]
    small = {**SMALL, "model": "own-linear", "limit": 20, "epochs": 1}
    with pytest.raises(UsageError, match=why) as caught:
        distcls.fit(**{"data": digits, "out": tmp_path / "run", **small, **keys})
    assert "\n" not in str(caught.value)
    begun = (tmp_path / "run" / "config.yaml").exists()
    assert begun is (name == "a callback that returns a score")


def test_what_a_callback_raises_is_left_as_it_is(digits: Path, tmp_path: Path) -> None:
    small = {**SMALL, "model": "own-linear", "limit": 20}
    run: dict[str, Any] = {"data": digits, "out": tmp_path / "run", **small}
    with pytest.raises(RuntimeError, match="the callback of the user's failed"):
        distcls.fit(callbacks=[own_hooks.failing], **run)
    # the epoch is done, and is not trained again
    seen: list[int] = []
    more = distcls.fit(resume="auto", callbacks=lambda run, metrics: seen.append(run.epoch), **run)
    assert (seen, more.epochs) == ([2], 2)


def test_one_process_that_fails_before_the_first_step(digits: Path, tmp_path: Path) -> None:
    options = ("--data", digits, "--out", tmp_path / "run", "--model", f"{HERE}:failing_on_one")
    said = run(*options, "--epochs", 1, module="distcls.train", processes=2, code=1).stderr
    assert "RuntimeError: the network of the user's failed" in said
    assert (
        said.count("error: another process failed, or cannot be reached, before the first step")
        == 1
    )
    assert "gloo" not in said.replace(said[said.index("error: another") :].splitlines()[0], "")
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_a_callback_that_fails_ends_all_processes(digits: Path, tmp_path: Path) -> None:
    small = ("--model", f"{HERE}:own-linear", "--epochs", 2, "--limit", 60, "--batch-size", 20)
    where = ("--data", digits, "--out", tmp_path / "run", "--callbacks", f"{HERE}:failing")
    began = time.monotonic()
    said = run(*where, *small, module="distcls.train", processes=2, code=1).stderr
    assert "RuntimeError: the callback of the user's failed" in said
    assert 'own_hooks.py", line' in said
    assert time.monotonic() - began < 120  # not the timeout of a collective operation


def test_what_metrics_and_callbacks_write_into_is_theirs() -> None:
    def scores(*metrics: Any) -> dict[str, float]:
        beside = [reference(each) for each in metrics]
        state = metric_state(Task(classes=("a", "b")), beside)
        state.update(np.eye(2, dtype=np.float32), np.array([0, 0]))
        found = state.compute()
        figures = found.scalars()
        assert found.confusion.sum() == 2
        return figures

    def spoils(logits: Any, labels: Any) -> Any:
        logits.fill(0)
        labels.fill(1)
        return np.ones(len(labels))

    def clean(logits: Any, labels: Any) -> Any:
        return logits[:, 0] + labels

    assert scores(spoils, lambda m: m.confusion.fill(0) or 0, clean)["clean"] == 0.5


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, momentum=0.9),
        lambda params, lr: torch.optim.SGD(params, lr=lr),
        torch.optim.Adagrad,
        lambda groups, lr, config: torch.optim.SGD(groups, lr=lr),
    ],
)
def test_optimisers_by_what_they_take(make: Any) -> None:
    made = make_optimizer(OptimizerConfig(name=reference(make)), nn.Linear(2, 2), lr=0.5)
    assert made.param_groups[0]["lr"] == 0.5


def test_a_metric_of_images_adds_up_over_processes() -> None:
    task = Task(classes=("a", "b", "c"))
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(30, 3)).astype(np.float32), rng.integers(0, 3, 30)
    whole, merged = metric_state(task), metric_state(task)
    whole.update(logits, labels)
    for rank in range(3):
        part = metric_state(task)
        part.update(logits[rank::3], labels[rank::3])
        merged.merge(part.state())
    expected = own_hooks.brier(logits, labels).mean()
    for state in (whole, merged):
        found = state.compute()
        assert found.count == 30
        assert found.scalars()["brier"] == pytest.approx(expected, rel=1e-6)
