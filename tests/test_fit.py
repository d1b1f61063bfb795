"""Training from Python: `fit`, and configs out of what Python has."""

from __future__ import annotations

import dataclasses
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcls import log
from distcls.data.dataset import Dataset
from distcls.errors import BadValue, UsageError
from distcls.files import RECIPES
from distcls.models.checkpoint import load_tensors
from distcls.training.config import EmaConfig, TrainConfig
from distcls.training.run import TrainResult, fit, train
from tests.conftest import registered_here
from tests.e2e.commands import run
from tests.pictures import encode, smooth

FEW: dict[str, Any] = {
    "model": "simple_cnn",
    "epochs": 2,
    "limit": 60,
    "batch_size": 20,
    "ema": {"decay": 0.9},
}


@pytest.fixture(scope="module")
def fitted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return fit(data=digits, out=tmp_path_factory.mktemp("fit") / "run", quiet=True, **FEW)


def test_it_is_the_run_of_the_command(fitted: TrainResult, digits: Path, tmp_path: Path) -> None:
    flags = ("--model", "simple_cnn", "--epochs", 2, "--limit", 60, "--batch-size", 20)
    run("train", "--data", digits, "--out", tmp_path / "run", *flags, "--ema.decay", 0.9)
    ours, theirs = (load_tensors(out / "best.pth") for out in (fitted.out, tmp_path / "run"))
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in ours["model"].items():
        assert torch.equal(value, theirs["model"][name])


def test_the_result_has_the_history(fitted: TrainResult) -> None:
    assert [row["epoch"] for row in fitted.history] == [1, 2]
    best = fitted.history[fitted.best_epoch - 1]
    assert best["val_top1"] == fitted.best_score
    frame = fitted.to_dataframe()
    assert list(frame.index) == [1, 2]
    assert frame["val_top1"].max() == fitted.best_score
    assert "history" not in fitted.to_json()


def test_it_runs_again_in_the_same_process(fitted: TrainResult, tmp_path: Path) -> None:
    """With another precision too, which accelerate holds for the whole process."""
    config = TrainConfig.from_yaml(fitted.out / "config.yaml", out=tmp_path / "again")
    assert config.ema.decay == 0.9
    states = random_states()
    assert fit(config, epochs=1, precision="bf16").epochs == 1
    assert random_states() == states  # what a notebook draws is not the same after every run
    assert "precision: bf16" in (tmp_path / "again" / "config.yaml").read_text()
    assert fit(config, out=tmp_path / "third", precision="fp32").best_score == fitted.best_score


def random_states() -> tuple[Any, ...]:
    ours = np.random.get_state(legacy=False)
    return torch.get_rng_state().tolist(), repr(ours), random.getstate()


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_is_obeyed_and_ends_with_the_run(
    quiet: bool, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(data=digits, out=tmp_path / "run", quiet=quiet, **{**FEW, "epochs": 1})
    assert ("epoch 1/1" in capsys.readouterr().err) is not quiet
    log.say("said afterwards")
    assert "said afterwards" in capsys.readouterr().err


def test_options_replace_those_of_a_config_key_by_key(digits: Path) -> None:
    config = TrainConfig(data=digits, ema=EmaConfig(decay=0.9), optimizer={"weight_decay": 0.3})
    assert config.optimizer.weight_decay == 0.3
    with pytest.raises(UsageError, match=r"optimizer\.momentum: 'much' is not valid"):
        fit(config, optimizer={"momentum": "much"})


def test_a_config_takes_what_python_has() -> None:
    plain: dict[str, Any] = {
        "data": "photos",
        "out": "runs/photos",
        "model": "efficientnet_b0",
        "input": {"size": [192, 256]},
        "loss": {"name": "focal", "class_weights": {"a.b": 2, "c": 1}},
        "lr": "1e-3",
    }
    config = TrainConfig(**plain)
    assert (config.data, config.out) == (Path("photos"), Path("runs/photos"))
    assert (config.model.name, config.input.size, config.lr) == (
        "efficientnet_b0",
        (192, 256),
        1e-3,
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": "many"}, "epochs: 'many' is not valid, expected an integer or one of auto"),
        ({"data": None}, "data: None is not valid, expected a path"),
        ({"optimizer": 3}, "optimizer: 3 is not valid, expected a dict with its keys"),
        ({"optimizer": {"weight_decai": 1}}, "optimizer: unknown key 'weight_decai'; did you mean"),
        ({"ema": {"decay": 2}}, "ema: decay: 2.0 is not valid"),
        ({"input": {"size": (1, 2, 3)}}, "input: size: .* is not valid, expected 2 integers"),
    ],
)
def test_wrong_values_are_refused_by_key_and_value(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TrainConfig(**{"data": "photos", **wrong})


def test_what_fit_needs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="data is missing"):
        fit(out=tmp_path)
    with pytest.raises(UsageError, match="unknown key 'epoch'; did you mean 'epochs'"):
        fit(data=tmp_path, epoch=3)
    with pytest.raises(BadValue, match="json"):
        fit(data=tmp_path, json=True)
    for wrong in ("config.yaml", {"data": "photos"}):
        with pytest.raises(UsageError, match=r"is no TrainConfig; TrainConfig\.from_yaml reads"):
            fit(wrong)  # type: ignore[arg-type]


def test_a_recipe_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig.from_yaml("digits", data="digits", optimizer={"weight_decay": 0.3})
    file = TrainConfig.from_yaml(RECIPES.find("digits"), data=Path("digits"))
    assert config.optimizer.weight_decay == 0.3
    assert dataclasses.replace(config, optimizer=file.optimizer) == file
    monkeypatch.chdir(tmp_path)
    for wrong, told in (
        ("digitz", "no file or recipe is called 'digitz'; did you mean 'digits'"),
        ("runs/config.yaml", r"cannot read config runs/config\.yaml: No such file"),
        (None, "config: None is not a path, expected a YAML file or a recipe's name"),
    ):
        with pytest.raises(UsageError, match=told):
            TrainConfig.from_yaml(wrong)  # type: ignore[arg-type]


EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_the_examples_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            image = encode(smooth() + number, "JPEG")
            (tmp_path / "photos" / name / f"{number}.jpg").write_bytes(image)
    monkeypatch.chdir(tmp_path)
    small = 'epochs=1, model="simple_cnn", input={"size": 32}'
    variables: dict[str, Any] = {}
    text, own = PAGE.read_text(encoding="utf-8").split("\n## Your own ")
    examples = EXAMPLE.findall(text)
    examples = examples[next(i for i, example in enumerate(examples) if "fit(" in example) :]
    for example in examples:
        exec(example.replace('epochs=20, model="mobilenet_v3_large"', small), variables)
    said = capsys.readouterr().out
    assert said.count("Prediction('photos/cat/1.jpg', label='") == 2
    assert (
        "ImageDataset('photos/', 20 images, 2 classes)\nExample('cat/0.jpg', label='cat')" in said
    )
    assert f"{variables['evaluation']}\n" in said
    assert "runs/photos/best.onnx 1.0 " in said
    tested = Dataset.open(tmp_path / "runs/photos/dataset").counts()["test"]
    assert variables["evaluation"].count == tested
    assert variables["few"].count == min(3, tested)
    assert variables["history"].index.tolist() == [1]
    assert variables["result"].out == Path("runs/again")
    module, use = EXAMPLE.findall(own)
    (tmp_path / "hooks.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    with registered_here():
        exec(use.replace("**own", 'epochs=2, input={"size": 32}, **own'), variables)
        again = variables["own"] | {"transform": variables["augment"], "model": "hooks:tiny"}
        found = fit(data="photos/", out="runs/v2", epochs=1, input={"size": 32}, **again)
    assert len(capsys.readouterr().out.splitlines()) == variables["result"].epochs
    assert found.history[0]["val_margin"] == found.best_score
    assert "name: hooks:tiny" in Path("runs/own/config.yaml").read_text()


def test_two_processes_train_twice_and_evaluate(digits: Path, tmp_path: Path) -> None:
    done = run(digits, tmp_path, module="tests.two_fits", processes=2)
    # the same config: both runs and both processes have the same score, accuracy and count
    figures = done.stdout.split()
    assert len(figures) == 12
    assert len(set(figures)) == 3
    assert figures.count("179") == 4


def test_one_thread_trains_at_a_time(digits: Path, tmp_path: Path) -> None:
    first = threading.Event()

    class Waiting:
        def on_train_start(self, run: Any) -> None:
            first.set()
            assert refused.wait(60)

    refused = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        options: dict[str, Any] = {"model": "simple_cnn", "epochs": 1, "limit": 32, "quiet": True}
        one = pool.submit(fit, data=digits, out=tmp_path / "one", callbacks=[Waiting()], **options)
        assert first.wait(60)
        with pytest.raises(UsageError, match="another thread of this process trains"):
            fit(data=digits, out=tmp_path / "two", **options)
        refused.set()
        assert one.result().epochs == 1
    assert fit(data=digits, out=tmp_path / "two", **options).epochs == 1


def test_train_and_fit_are_one(fitted: TrainResult, digits: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_yaml(fitted.out / "config.yaml", out=str(tmp_path / "run"))
    assert train(config).history[-1]["val_loss"] == fitted.history[-1]["val_loss"]


@pytest.mark.parametrize("data", [object(), 3, None, [Path("a")]])
def test_data_is_a_path(data: Any) -> None:
    with pytest.raises(UsageError, match=f"data: {type(data).__name__} is no path"):
        fit(data=data)
