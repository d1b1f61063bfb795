"""No key without an effect: with another value of any key a run leaves, or says, something else."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import distcls.commands.train
from distcls.config import leaves
from distcls.data.dataset import MANIFEST
from distcls.errors import DistclsError
from distcls.training.checkpointing import BEST
from distcls.training.config import TrainConfig
from tests import tiny_dataset

CLASSES = ("red", "green", "blue")
ROOT = Path(__file__).parents[2]

USUAL = {
    **{"model.name": "simple_cnn", "input.size": "12,12", "epochs": 2, "batch_size": 8},
    **{
        "lr": 0.01,
        "threads": 1,
        "checkpoint.save_top_k": "null",
        "checkpoint.save_best_only": "false",
    },
    **{"checkpoint.filename": "{epoch}.pth", "augment.crop_padding": 1},
}
"""The run that all others are compared with, but for what their row says."""

RANDAUGMENT = {"augment.policy": "randaugment"}
BOTH_MIXED = {"augment.mixup": 0.4, "augment.cutmix": 1}
OTHER_SIZE = {"model.pretrained": "@simple_nn", "model.name": "simple_nn", "input.size": "24,24"}
TAUGHT = {"distill.teacher": "@simple_cnn"}
NORMS = {"model.name": "mobilenet_v3_small", "epochs": 1}
PLATEAU = {"schedule.name": "plateau", "schedule.warmup": "0 steps", "monitor.min_delta": 1}


def named(name: str, **more: Any) -> dict[str, Any]:
    """A schedule or optimiser of another name."""
    section = "schedule" if name in SCHEDULES else "optimizer"
    return {f"{section}.name": name, **{f"{section}.{key}": more[key] for key in more}}


SCHEDULES = ("restarts", "step", "multistep", "plateau", "onecycle")

WEIGHTS, WORDS, FILES, REFUSED = "weights", "words", "files", "refused"

ROWS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "data": ("@other", {}, WEIGHTS),
    "epochs": (3, {}, WEIGHTS),
    "batch_size": (4, {}, WEIGHTS),
    "lr": (0.02, {}, WEIGHTS),
    "seed": (1, {}, WEIGHTS),
    "limit": (12, {}, WEIGHTS),
    "precision": ("bf16", {}, WEIGHTS),
    "memory_format": ("contiguous", {}, WORDS),
    "accumulate": (2, {}, WORDS),
    "auto_micro_batch": ("true", {}, FILES),
    "processes": (2, {}, REFUSED),
    "threads": (2, {}, WORDS),
    "log_every": (1, {}, FILES),
    "tracker": ("tensorboard", {}, FILES),
    "callbacks": ("tests.plain_hooks:ending", {}, WEIGHTS),
    "quiet": ("true", {}, WORDS),
    "json": ("true", {}, WORDS),
    "model.name": ("simple_nn", {}, WEIGHTS),
    "model.stem_stride": (2, NORMS, WEIGHTS),
    "model.dropout": (0.1, {}, WEIGHTS),
    "model.pool": ("columns", {**NORMS, "input.size": "12,64"}, WEIGHTS),
    "model.batch_norm_momentum": (0.5, NORMS, WEIGHTS),
    "model.batch_norm_bias_correction": (False, NORMS, WEIGHTS),
    "model.pretrained": ("@simple_cnn", {}, WEIGHTS),
    "model.pretrained_sha256": ("0" * 64, {"model.pretrained": "@simple_cnn"}, REFUSED),
    "model.pretrained_match": ("structure", {"model.pretrained": "@simple_cnn"}, WORDS),
    "model.allow_partial": ("true", OTHER_SIZE, REFUSED),
    "model.init": ("he", {}, WEIGHTS),
    "input.size": ("14,14", {}, WEIGHTS),
    "input.resize": ("pad", {}, WEIGHTS),
    "input.interpolation": ("cubic", {"input.size": "10,10"}, WEIGHTS),
    "input.crop_fraction": (0.8, {}, WEIGHTS),
    "loader.pack": ("off", {}, WORDS),
    "augment.flip": (0.0, {}, WEIGHTS),
    "augment.crop_padding": (2, {}, WEIGHTS),
    "augment.resized_crop": ("0.5,1", {"augment.crop_padding": 0}, WEIGHTS),
    "augment.rotate": (20, {}, WEIGHTS),
    "augment.erase": (0.5, {}, WEIGHTS),
    "augment.policy": ("trivialaugment", {}, WEIGHTS),
    "augment.randaugment_ops": (1, RANDAUGMENT, WEIGHTS),
    "augment.randaugment_magnitude": (20, RANDAUGMENT, WEIGHTS),
    "augment.color_jitter": ("0.4,0.4,0.4,0.1", {}, WEIGHTS),
    "augment.transform": ("tests.plain_hooks:Shade", {}, WEIGHTS),
    "augment.mixup": (0.4, {}, WEIGHTS),
    "augment.cutmix": (1, {}, WEIGHTS),
    "augment.mix_probability": (0.5, BOTH_MIXED, WEIGHTS),
    "augment.cutmix_probability": (0.9, BOTH_MIXED, WEIGHTS),
    "optimizer.name": ("ranger", {}, WEIGHTS),
    "optimizer.weight_decay": (0.5, {}, WEIGHTS),
    "optimizer.beta1": (0.8, {}, WEIGHTS),
    "optimizer.beta2": (0.9, {}, WEIGHTS),
    "optimizer.eps": (1e-3, {}, WEIGHTS),
    "optimizer.momentum": (0.5, named("sgd"), WEIGHTS),
    "optimizer.nesterov": ("true", named("sgd"), WEIGHTS),
    "optimizer.layer_decay": (0.5, {}, WEIGHTS),
    "optimizer.head_lr_scale": (2, {}, WEIGHTS),
    "optimizer.clip_norm": (0.01, named("sgd"), WEIGHTS),
    "schedule.name": ("constant", {}, WEIGHTS),
    "schedule.warmup": ("1 epoch", {}, WEIGHTS),
    "schedule.start": (0.5, named("onecycle"), WEIGHTS),
    "schedule.final": (0.5, {}, WEIGHTS),
    "schedule.period": ("2 steps", named("restarts"), WEIGHTS),
    "schedule.multiplier": (2, named("restarts", period="2 steps"), WEIGHTS),
    "schedule.every": ("3 steps", named("step"), WEIGHTS),
    "schedule.milestones": ("2 steps", named("multistep"), WEIGHTS),
    "schedule.factor": (0.5, named("step"), WEIGHTS),
    "schedule.patience": (1, {**PLATEAU, "epochs": 3}, WEIGHTS),
    "loss.name": ("bce", {}, WEIGHTS),
    "loss.label_smoothing": (0.1, {}, WEIGHTS),
    "loss.focal_gamma": (0.5, {"loss.name": "focal"}, WEIGHTS),
    "loss.class_weights": ("red=3", {}, WEIGHTS),
    "loss.sample_weights": ("off", {"data": "@weighted"}, WEIGHTS),
    "distill.teacher": ("@simple_cnn", {}, WEIGHTS),
    "distill.temperature": (1, TAUGHT, WEIGHTS),
    "distill.weight": (0.9, TAUGHT, WEIGHTS),
    "freeze.backbone": ("1 epoch", {}, WEIGHTS),
    "freeze.names": ("features.0", {}, WEIGHTS),
    # of the average and the weights it takes those with the higher loss: the average
    "ema.decay": (0.5, {"monitor.metric": "loss", "monitor.mode": "max"}, WEIGHTS),
    "average.last_epochs": (2, {}, WEIGHTS),
    "monitor.metric": ("loss", {}, WORDS),
    "monitor.mode": ("min", {"epochs": 3}, WORDS),
    "monitor.patience": (1, {"epochs": 3, "monitor.min_delta": 1}, WEIGHTS),
    "monitor.min_delta": (1, {"epochs": 3, "monitor.metric": "loss"}, WORDS),
    "checkpoint.every_steps": (1, {}, FILES),
    "checkpoint.every_minutes": (1e-9, {"checkpoint.keep_last": 9}, FILES),
    "checkpoint.keep_last": (1, {}, FILES),
    "checkpoint.filename": ("kept_{epoch}.pth", {}, FILES),
    "checkpoint.save_top_k": (1, {}, FILES),
    "checkpoint.save_best_only": ("true", {"monitor.min_delta": 1}, FILES),
    "checkpoint.save_training_state": ("true", {}, FILES),
}
"""Of a key: another value (@: a place that the tests make), what else both runs have, and where the
difference has to show."""

ELSEWHERE = {
    "out": "tests/e2e/test_training.py::test_a_run_leaves_its_files_and_learns",
    "source": "tests/e2e/test_from_a_folder.py"
    "::test_config_yaml_prepares_it_again_where_it_is_gone",
    "max_bad": "tests/test_hostile_inputs.py::test_train_stops_likewise",
    "input.background": "tests/test_transparency.py"
    "::test_another_background_is_taken_for_files_and_refused_for_a_pack",
    "compile": "tests/test_compiling.py::test_a_compiled_run_takes_the_same_losses",
    "cuda_graphs": "tests/e2e/test_gpu.py::test_recorded_passes_train_the_same",
    "sync_batch_norm": "tests/e2e/test_invariance.py"
    "::test_two_processes_with_synchronised_norm_take_the_same_losses",
    "resume": "tests/e2e/test_training.py::test_killed_and_resumed_ends_with_the_same_weights",
    "max_nonfinite_steps": "tests/faults/test_numbers.py"
    "::test_bad_numbers_without_end_stop_the_run",
    "collective_timeout": "tests/test_launch_two_nodes.py"
    "::test_a_cable_that_stays_unplugged_ends_the_run",
    "loader.workers": "tests/e2e/test_every_option.py::test_so_many_threads_decode",
    "loader.prefetch": "tests/test_loader.py::test_it_reads_no_further_ahead_than_told",
    "loader.timeout": "tests/faults/test_workers.py::test_reading_threads_that_die_end_the_run",
}
"""Keys whose effect takes several processes, a fault or much time to see, and where it is seen."""


@dataclasses.dataclass(frozen=True)
class Left:
    """What a run left, without what differs from one time to the next."""

    weights: str
    """Digest of all models that it kept."""
    words: str
    """What it said."""
    files: tuple[str, ...]
    """Names, lines of metrics.jsonl, and what a kept model holds."""
    refused: str
    """The reason, if it was."""


Train = Callable[[dict[str, Any]], Left]


@pytest.fixture(scope="module", autouse=True)
def _without_curves() -> Iterator[None]:
    """No drawing, which takes most of the time of such a run; tests/test_plots.py looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distcls.training.logging.curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains with a config's keys, each of them once."""
    folder = tmp_path_factory.mktemp("options")
    places = {"@data": folder / "data", "@other": folder / "other"}
    for seed, place in enumerate(places.values()):
        images, labels = tiny_dataset.coloured(32, size=16, seed=seed)
        # not square, for each way to resize to differ
        splits = ["train"] * 20 + ["val"] * 12
        tiny_dataset.write(place, images[:, :12], labels, CLASSES, splits=splits, files=True)
    done: dict[str, Left] = {}

    def train(keys: dict[str, Any]) -> Left:
        name = json.dumps(keys, sort_keys=True)
        if name not in done:
            done[name] = observe(keys, folder / f"run{len(done)}", places)
        return done[name]

    places["@again"] = places["@data"]
    places["@weighted"] = weighted(places["@data"], folder / "weighted")
    for number, name in enumerate(("simple_cnn", "simple_nn")):
        train({**USUAL, "model.name": name, "seed": 7})
        places[f"@{name}"] = folder / f"run{number}" / BEST
    return train


def weighted(data: Path, copy: Path) -> Path:
    """The same dataset, the images of which count differently."""
    shutil.copytree(data, copy)
    table = pq.read_table(copy / MANIFEST)
    weights = pa.array(np.linspace(0.1, 2, len(table)))
    pq.write_table(table.append_column("weight", weights), copy / MANIFEST)
    return tiny_dataset.sign(copy)


def observe(keys: dict[str, Any], out: Path, places: dict[str, Path]) -> Left:
    """Train, and look at what is there then."""
    flags = {"data": "@data", "out": out, **keys}
    texts = {key: str(places.get(value, value)) for key, value in flags.items()}
    arguments = [word for key, text in texts.items() for word in (f"--{key}", text)]
    printed, said = io.StringIO(), io.StringIO()
    refused = ""
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(said),
        # three quarters of the time of such a run, and no key is about it
        mock.patch("distcls.plotting.curves"),
    ):
        try:
            distcls.commands.train.main(arguments)
        except DistclsError as error:
            refused = str(error)
    words = timeless(f"{printed.getvalue()}\n{said.getvalue()}".replace(str(out), "OUT"))
    return Left(weights=digest(out), words=words, files=tuple(contents(out)), refused=refused)


def digest(out: Path) -> str:
    """Of the weights of all kept models, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(out.glob("*.pth")):
        for tensor in torch.load(path, weights_only=True)["model"].values():
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def timeless(words: str) -> str:
    """Without rates, shares and durations."""
    words = re.sub(r"  data wait \d+%", "", words)  # there if it is long
    return re.sub(r"[\d,.]+(?=( images/s|%| s\b| min\b|, \"))|\"seconds\": [\d.]+", "T", words)


def contents(out: Path) -> Iterator[str]:
    """Names of all files, lines of metrics.jsonl, and what a kept model holds."""
    for path in sorted(out.rglob("*")):
        yield re.sub(r"\.[0-9a-f]{8,}\.|tfevents.*", ".", str(path.relative_to(out)))
        if path.name == "metrics.jsonl":
            for line in path.read_text().splitlines():
                yield json.loads(line)["kind"]
        elif path.suffix == ".pth" and path.parent == out:
            yield from torch.load(path, weights_only=True)


def test_the_same_keys_leave_the_same(trained: Train, tmp_path: Path) -> None:
    """A difference below is made by the key."""
    assert trained({**USUAL, "data": "@again"}) == trained(USUAL)


def test_so_many_threads_decode(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[int] = []

    class Spy(ThreadPoolExecutor):
        def __init__(self, workers: int, **more: Any) -> None:
            pools.append(workers)
            super().__init__(workers, **more)

    monkeypatch.setattr("distcls.training.loader.ThreadPoolExecutor", Spy)
    trained({**USUAL, "loader.workers": 3})
    assert set(pools) == {3}


def test_every_key_is_here() -> None:
    keys = {leaf.key for leaf in leaves(TrainConfig)}
    assert ROWS.keys() | ELSEWHERE.keys() == keys
    assert not ROWS.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("key", ROWS)
def test_another_value_leaves_something_else(key: str, trained: Train) -> None:
    value, both, where = ROWS[key]
    usual = {**USUAL, **both}
    runs = trained(usual), trained({**usual, key: value})
    assert getattr(runs[0], where) != getattr(runs[1], where)
    assert where == REFUSED or not any(run.refused for run in runs)


@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_other_test_is_there(key: str) -> None:
    file, _, function = ELSEWHERE[key].partition("::")
    assert f"def {function}(" in (ROOT / file).read_text()
