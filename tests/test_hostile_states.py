"""Training states, parts of an output and cached choices of others, and damaged ones."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distcls.batch.parts import PartRecord, Parts, open_parts, read_fingerprint
from distcls.errors import DistclsError, UsageError
from distcls.files import digest
from distcls.models.checkpoint import content_digest, load_tensors, save_tensors
from distcls.runtime.autotune import read_cache
from distcls.runtime.providers import ExecutionConfig, ExecutionRequest
from distcls.stored import Unfit
from distcls.system import cache_folder
from distcls.training.checkpointing import CheckpointManager, newest_intact, states
from distcls.training.config import OptimizerConfig
from distcls.training.engine import scaler_schema
from distcls.training.fsdp import load_full_optimizer_state
from tests import flipping
from tests.optimizing import made, network, train
from tests.test_compatibility import FIXTURES, old, old_config
from tests.test_state import config, resume, write_state

__all__ = ["old"]
SUBSET = 32 * flipping.STRIDE


@pytest.mark.row(46)
@pytest.mark.parametrize("stride", [SUBSET, pytest.param(flipping.STRIDE, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_a_state(tmp_path: Path, stride: int) -> None:
    folder = tmp_path / "last"
    folder.mkdir()
    [source] = states(FIXTURES / "run" / "last")
    path = folder / source.name
    path.write_bytes(source.read_bytes())

    def read() -> Any:
        found = newest_intact(folder)
        assert found is not None
        return content_digest(found[1])

    found = flipping.flip(path, read, stride=stride)
    assert found.refused == found.tried
    print(f"state: {found}")


@pytest.mark.row(46)
@pytest.mark.parametrize("stride", [SUBSET, pytest.param(flipping.STRIDE, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_a_model_with_its_state(tmp_path: Path, stride: int) -> None:
    content = load_tensors(FIXTURES / "whole" / "simple_cnn_e4_0.47500.pth")
    path = tmp_path / "model.pth"
    save_tensors(path, content | {"sha256": content_digest(content)})
    found = flipping.flip(path, lambda: content_digest(load_tensors(path)), stride=stride)
    assert found.refused > found.tried // 2
    print(f"model with its state: {found}")


@pytest.mark.row(46)
@pytest.mark.parametrize("stride", [flipping.STRIDE, pytest.param(7, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("old")
def test_a_flipped_bit_in_the_config_of_a_run(stride: int) -> None:
    """Nothing of what the run has learned may change; how long it goes on is the user's."""
    path = Path("run/config.yaml")
    given = old_config("--resume", "auto")

    def read() -> Any:
        with contextlib.closing(CheckpointManager(given)) as manager:
            found = manager.resume()
        assert found is not None
        return found.before, content_digest(found.tensors)

    found = flipping.flip(path, read, stride=stride)
    assert found.tried == found.refused + found.without_effect > 10
    print(f"config.yaml: {found}")


# --- moments


def saved(name: str) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """An optimiser that has not stepped, and the state of one that has."""
    model, other = network(), network()
    one = made(OptimizerConfig(name=name), model)
    train(model, one, range(8))
    return made(OptimizerConfig(name=name), other), copy.deepcopy(one.state_dict())


@pytest.mark.row(47)
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("adamw", "exp_avg"),
        ("adamw", "exp_avg_sq"),
        ("adam", "exp_avg_sq"),
        ("sgd", "momentum_buffer"),
        ("rmsprop", "square_avg"),
        ("adabelief", "exp_avg_var"),
        ("ranger", "lookahead_slow_buff"),
        ("lamb", "exp_avg"),
    ],
)
def test_moments_of_another_shape_are_refused(name: str, key: str) -> None:
    """Fused kernels would walk past the end of a shorter tensor, which ended in SIGSEGV."""
    optimizer, state = saved(name)
    load_full_optimizer_state(optimizer, copy.deepcopy(state))
    for wrong in (torch.zeros(1), torch.zeros(()), torch.zeros(7, 5)):
        forged = copy.deepcopy(state)
        forged["state"][0][key] = wrong
        with pytest.raises(Unfit, match=f"{key} in the state of 0 is .*, expected the shape"):
            load_full_optimizer_state(optimizer, forged)


@pytest.mark.row(47)
@pytest.mark.parametrize(
    "value", [-1.0, float("nan"), 2.0**60, "x", None, torch.tensor(-5.0), torch.zeros(3)]
)
def test_step_counts_that_are_none_are_refused(value: Any) -> None:
    optimizer, state = saved("adamw")
    state["state"][0]["step"] = value
    with pytest.raises(Unfit, match="step in the state of 0"):
        load_full_optimizer_state(optimizer, state)


@pytest.mark.row(47)
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_missing_is_refused(key: str) -> None:
    optimizer, state = saved("adamw")
    del state["state"][0][key]
    with pytest.raises(Unfit, match=f"expected a value for {key}"):
        load_full_optimizer_state(optimizer, state)


@pytest.mark.row(47)
@pytest.mark.parametrize(
    ("key", "value"),
    [("eps", float("nan")), ("betas", (2.0, 3.0)), ("lr_scale", 1e9), ("weight_decay", "x")],
)
def test_options_other_than_the_configs_are_refused(key: str, value: Any) -> None:
    optimizer, state = saved("adamw")
    state["param_groups"][0][key] = value
    with pytest.raises(Unfit, match=rf"{key} of the optimizer is .* as in the config"):
        load_full_optimizer_state(optimizer, state)


@pytest.mark.row(47)
@pytest.mark.parametrize(
    "change", [{"scale": float("nan")}, {"scale": 0.0}, {"growth_interval": -1}, {"more": 1}]
)
def test_a_scaler_that_is_none_is_refused(change: dict[str, Any]) -> None:
    good = torch.amp.GradScaler("cpu").state_dict()
    scaler_schema(good, "scaler")
    with pytest.raises(Unfit):
        scaler_schema(good | change, "scaler")


@pytest.mark.row(47)
@pytest.mark.usefixtures("old")
def test_forged_moments_end_a_resumed_run_in_one_line() -> None:
    from distcls.training.run import train as train_run

    now = old_config("--resume", "auto")
    [path] = states(Path("run/last"))
    content = torch.load(path, weights_only=True)
    path.unlink()
    content["tensors"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    write_state(now, content, step=7)
    with pytest.raises(UsageError, match="its tensors do not fit this run: exp_avg in the state"):
        train_run(now)


# --- files in the places of states


@pytest.mark.row(47)
@pytest.mark.parametrize("kind", ["pipe", "dangling", "endless", "folder"])
def test_what_is_no_file_in_a_states_place(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = config(tmp_path)
    path = now.out / "last" / f"step_00000003.{'0' * 32}.pth"
    path.parent.mkdir(parents=True)
    {
        "pipe": lambda: os.mkfifo(path),
        "dangling": lambda: path.symlink_to("nowhere"),
        "endless": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises(DistclsError, match="no state is intact"):
        resume(now)
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.row(47)
@pytest.mark.parametrize(
    "name", ["notes.pth\n", "x" * 300 + ".pth", "a\0.pth", ".pth/..", "..pth/"]
)
def test_more_names_that_are_no_models(name: str, tmp_path: Path) -> None:
    from tests.test_state import changed

    now = config(tmp_path)
    write_state(now, changed(now, kept=[(0.5, name)]))
    with pytest.raises(UsageError, match="as a model of the run"):
        resume(now)


# --- parts of an output


def one_part(out: Path) -> Path:
    """A folder of parts with one finished part; its record."""
    with open_parts(out, resume=False, overwrite=False) as parts:
        rows = parts.path(0, ".csv")
        rows.write_text("a,b\n")
        record = PartRecord(
            rows=1,
            errors=0,
            abstained=0,
            first_error="",
            picked=[[0, "cat", 0.5]],
            files={rows.name: digest(rows)},
        )
        parts.finish(record)
        return parts.path(0, ".json")


@pytest.mark.row(47)
@pytest.mark.parametrize(
    "change",
    [
        {"rows": -1},
        {"rows": "1"},
        {"errors": None},
        {"first_error": 3},
        {"picked": [[1]]},
        {"picked": [["0", "cat", 0.5]]},
        {"picked": 3},
        {"files": {"../../secret": "0" * 64}},
        {"files": {"00000001.csv": "0" * 64}},
        {"files": ["00000000.csv"]},
        {"more": 1},
    ],
)
def test_records_of_others_are_predicted_again(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = one_part(tmp_path / "pre.csv")
    values = json.loads(path.read_text())
    parts = Parts(tmp_path / "pre.csv")
    parts.load()
    assert parts.rows == 1
    path.write_text(json.dumps(values | change))
    parts.load()
    assert parts.rows == 0
    assert "predicting again from there" in capsys.readouterr().err


@pytest.mark.row(40)
@pytest.mark.parametrize("name", ["00000000.json", "00000000.csv", "fingerprint.json"])
def test_pipes_in_the_places_of_parts(name: str, tmp_path: Path) -> None:
    path = one_part(tmp_path / "pre.csv").with_name(name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert read_fingerprint(tmp_path / "pre.csv").values == {}
    parts = Parts(tmp_path / "pre.csv")
    parts.load()
    assert parts.rows == (name == "fingerprint.json")


# --- the cache


@pytest.mark.row(47)
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
def test_no_file_in_the_place_of_a_cached_choice(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCLS_CACHE", str(tmp_path))
    path = cache_folder() / "providers" / "key.json"
    path.parent.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert read_cache("key", ExecutionRequest(images=300)) is None


@pytest.mark.row(47)
@pytest.mark.parametrize(
    "change", [{"threads": 100_000}, {"streams": 10**12}, {"batch_size": 2**40}]
)
def test_no_more_threads_than_a_machine_has(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="a whole number from"):
        ExecutionConfig.from_json(ExecutionConfig().to_json() | change)


@pytest.mark.row(47)
def test_a_state_is_what_was_saved() -> None:
    """The digest covers all that a state holds."""
    [path] = states(FIXTURES / "run" / "last")
    content = torch.load(path, weights_only=True)
    stream = io.BytesIO()
    torch.save(content, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=True)
    assert content_digest(again) == content_digest(content)
    again["tensors"]["ema_updates"] += 1
    assert content_digest(again) != content_digest(content)
