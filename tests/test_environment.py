"""Processes and precision, checked before the first step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distcls.errors import BadValue, UsageError
from distcls.training.distributed import (
    check_processes,
    choose_precision,
    process_group_timeout,
    set_threads,
)

VARIABLES = (
    "WORLD_SIZE",
    "RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "ACCELERATE_MIXED_PRECISION",
    "TORCHELASTIC_RUN_ID",
)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_plain_run_is_one_process() -> None:
    check_processes(None)
    check_processes(1)


def test_fewer_processes_than_asked_for() -> None:
    with pytest.raises(UsageError) as caught:
        check_processes(2)
    text = str(caught.value)
    assert text.startswith("processes: 2 requested, 1 running")
    assert "accelerate launch --multi_gpu --num_processes 2" in text


@pytest.mark.parametrize(("world_size", "wanted"), [("2", 4), ("4", 2), ("2", 1)])
def test_another_number_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, world_size: str, wanted: int
) -> None:
    launched(monkeypatch, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1")
    with pytest.raises(UsageError, match=f"{wanted} requested, {world_size} running"):
        check_processes(wanted)


def test_the_right_number_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", ACCELERATE_MIXED_PRECISION="no")
    check_processes(2)
    check_processes(None)


def test_accelerate_that_silently_started_one(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, MASTER_ADDR="127.0.0.1", ACCELERATE_MIXED_PRECISION="no")
    for wanted in (None, 1):
        with pytest.raises(UsageError, match="told to start several processes but started one"):
            check_processes(wanted)


def test_accelerate_told_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, ACCELERATE_MIXED_PRECISION="no")
    check_processes(None)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launched(monkeypatch, WORLD_SIZE="4", LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none")
    with pytest.raises(UsageError, match=r"^2 processes on this machine and 1 GPU, but") as caught:
        check_processes(None)
    assert "start 1, or train on the CPU with CUDA_VISIBLE_DEVICES= (empty)" in str(caught.value)
    for gpus in (0, 2, 3):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        check_processes(None)
    # of processes that srun has started each may see a GPU of its own
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    check_processes(None)


@NO_GPU
def test_precision_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("auto") == "fp32"
    assert choose_precision("fp32") == "fp32"
    assert choose_precision("bf16") == "bf16"
    with pytest.raises(BadValue, match=r"precision: 'fp16' is not valid.*needs a GPU"):
        choose_precision("fp16")
    launched(monkeypatch, ACCELERATE_MIXED_PRECISION="fp16")
    with pytest.raises(BadValue, match="needs a GPU"):
        choose_precision("auto")


@pytest.mark.parametrize(
    ("launcher", "wanted", "chosen"),
    [("bf16", "auto", "bf16"), ("bf16", "fp32", "fp32"), ("no", "bf16", "bf16")],
)
def test_the_launchers_precision_counts_where_the_config_leaves_it_open(
    monkeypatch: pytest.MonkeyPatch, launcher: str, wanted: str, chosen: str
) -> None:
    launched(monkeypatch, ACCELERATE_MIXED_PRECISION=launcher)
    assert choose_precision(wanted) == chosen


@NO_GPU
def test_a_launcher_without_a_precision_leaves_the_device_to_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched(monkeypatch, ACCELERATE_MIXED_PRECISION="no")
    assert choose_precision("auto") == "fp32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_precision_with_a_gpu() -> None:
    assert choose_precision("auto") in ("bf16", "fp16")
    assert choose_precision("fp16") == "fp16"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_are_shared_among_this_machines_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads(3)
    assert torch.get_num_threads() == 3
    set_threads(None)
    alone = torch.get_num_threads()
    assert alone >= 1
    launched(monkeypatch, LOCAL_WORLD_SIZE="2")
    set_threads(None)
    assert torch.get_num_threads() == max(1, alone // 2)
    launched(monkeypatch, LOCAL_WORLD_SIZE="1000")
    set_threads(None)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("seconds", [0.5, 600.0, 1800.0])
def test_the_time_limit_reaches_the_backend_whatever_its_default(seconds: float) -> None:
    handed_on = process_group_timeout(seconds).to_kwargs()
    assert handed_on["timeout"].total_seconds() == pytest.approx(seconds, abs=1e-3)
