"""Sharded weights against whole ones, on two real gloo processes: the same run, half the memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcls.errors import UsageError
from distcls.models.checkpoint import load_tensors
from distcls.training.config import OptimizerConfig, TrainConfig
from distcls.training.fsdp import (
    _units,
    _units_by_size,
    load_full_optimizer_state,
    require_shardable,
)
from distcls.training.sampler import ShardedSampler
from tests.forked import spawn
from tests.sharded_training import (
    FSDP,
    IN_BF16,
    IN_FULL,
    POISON,
    STEPS,
    WORLD,
    backbone,
    work,
    work_on_network,
)

Seen = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written of all cases."""
    folder = tmp_path_factory.mktemp("sharded")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        for cases in (IN_FULL, IN_BF16):  # a process has one precision
            spawn(work, (digits, folder, cases), WORLD)
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
    return folder


@pytest.fixture(params=[*IN_FULL, *IN_BF16])
def case(request: pytest.FixtureRequest, folder: Path) -> tuple[str, list[Seen]]:
    """A case, and what each process saw of it."""
    ranks = [load_tensors(folder / f"{request.param}.{rank}.pth") for rank in range(WORLD)]
    return request.param, ranks


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, f"{name}/{key}")


def assert_close(one: object, other: object, *, exact: bool = False) -> None:
    first, second = dict(tensors_in(one)), dict(tensors_in(other))
    assert first.keys() == second.keys()
    assert len(first) > 10
    bounds = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 2e-3, "atol": 2e-5}
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, **bounds, msg=lambda m, n=name: f"{n}: {m}")


def test_a_sharded_run_is_the_whole_run(case: tuple[str, list[Seen]]) -> None:
    name, [main, other] = case
    noise = 1e-2 if name in IN_BF16 else 1e-4  # bf16 rounds a last digit into the third
    for rank in (main, other):
        whole, sharded = rank["whole"], rank["sharded"]
        assert len(whole["losses"]) == 2 * STEPS
        assert sharded["losses"][0] == pytest.approx(whole["losses"][0], rel=1e-6)
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=noise)
        for before, after in zip(whole["scores"], sharded["scores"], strict=True):
            assert after == pytest.approx(before, rel=10 * noise)
    assert main["sharded"]["losses"] == other["sharded"]["losses"]
    assert main["sharded"]["scores"] == other["sharded"]["scores"]


def test_its_state_is_the_whole_state(case: tuple[str, list[Seen]]) -> None:
    name, [main, other] = case
    if name in IN_FULL:
        assert_close(main["whole"]["tensors"], main["sharded"]["tensors"])
        assert_close(main["whole"]["best"], main["sharded"]["best"])
    for name, value in tensors_in(main["sharded"]):
        assert type(value) is Tensor, name
    # the whole weights are not sent to where nobody writes them
    assert other["sharded"]["tensors"]["model"]["backbone.0.0.weight"] is None


def test_each_process_holds_its_part_alone(case: tuple[str, list[Seen]]) -> None:
    _, ranks = case
    for how, parts in (("whole", 1), ("sharded", WORLD)):
        one, two = (rank[how]["held"] for rank in ranks)
        assert [name for name, _, _ in one] == [name for name, _, _ in two]
        total = sum(size for _, _, size in one)
        assert total > 10_000
        for held in (one, two):
            assert sum(own for _, own, _ in held) == pytest.approx(total / parts, rel=0.1)
        if parts > 1:
            for (name, own, size), (_, rest, _) in zip(one, two, strict=True):
                assert own + rest == size, name


def test_a_bad_step_is_skipped_by_both(folder: Path) -> None:
    for name in ("adamw poisoned", "sgd poisoned"):
        for rank in range(WORLD):
            seen = load_tensors(folder / f"{name}.{rank}.pth")
            assert seen["whole"]["skipped"] == seen["sharded"]["skipped"] == [POISON + 1]


def test_a_resumed_run_is_the_unbroken_one(folder: Path) -> None:
    seen = load_tensors(folder / "resumed.0.pth")
    for how in ("whole", "sharded"):
        assert_close(seen[f"{how} unbroken"], seen[f"{how} to {how}"], exact=True)


def test_a_state_passes_between_whole_and_sharded_runs(folder: Path) -> None:
    seen = load_tensors(folder / "resumed.0.pth")
    for first, second in (("whole", "sharded"), ("sharded", "whole")):
        assert_close(seen[f"{first} unbroken"], seen[f"{first} to {second}"])


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(data=Path("data"), out=Path("run"), **changes)


def asked(monkeypatch: pytest.MonkeyPatch, processes: int = 2, **more: str) -> None:
    for name, value in {**FSDP, "WORLD_SIZE": str(processes), **more}.items():
        monkeypatch.setenv(name, value)


def test_what_sharding_excludes_matters_to_sharded_runs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_shardable(config(compile=True, auto_micro_batch=True), "fp16")
    asked(monkeypatch)
    require_shardable(config(), "bf16")


@pytest.mark.parametrize(
    ("changes", "precision", "environment", "reason"),
    [
        ({"auto_micro_batch": True}, "fp32", {}, "auto_micro_batch tries .* choose --accumulate"),
        ({"compile": True}, "fp32", {}, "compile times .* leave --compile off"),
        ({"optimizer": OptimizerConfig(name="lamb")}, "fp32", {}, "lamb may need full .* adamw"),
        ({}, "fp16", {}, "precision: .* choose bf16 or fp32"),
        ({}, "fp32", {"WORLD_SIZE": "1"}, "there is one process, and nothing to shard"),
        ({}, "fp32", {"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({}, "fp32", {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: .* set it to false"),
        ({}, "fp32", {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient"),
        ({}, "fp32", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "dropout would drop others"),
    ],
)
def test_what_sharding_excludes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    precision: str,
    environment: dict[str, str],
    reason: str,
) -> None:
    asked(monkeypatch, **environment)
    with pytest.raises(UsageError, match=f"^FSDP: .*{reason}") as caught:
        require_shardable(config(**changes), precision)
    assert "\n" not in str(caught.value)


class Plugin:
    """What `_units` reads of accelerate's plugin."""

    def __init__(self, policy: object, names: list[str] | None = None, least: int = 0) -> None:
        self.auto_wrap_policy = policy
        self.transformer_cls_names_to_wrap = names
        self.min_num_params = least


def test_units_by_size_are_the_smallest_blocks_that_are_called() -> None:
    network = backbone()
    first, second, _, head = network
    assert _units_by_size(network, 200) == [first, second, head]
    assert _units_by_size(network, 1000) == [second]
    together = nn.Sequential(nn.Sequential(first, second), nn.ModuleList([head]))
    assert _units_by_size(together, 1200) == [together[0]]  # neither of its blocks has so many
    assert _units_by_size(together, 500) == [second, head]
    assert _units_by_size(nn.Sequential(nn.Linear(100, 100)), 10) == []


def test_units_by_class_name() -> None:
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy as by_name

    network: Any = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Bilinear(2, 2, 2))
    assert _units(network, Plugin(None)) == []
    assert _units(network, Plugin(by_name, ["Linear", "Bilinear"])) == [network[1], network[0][0]]
    with pytest.raises(UsageError, match=r"no layer is a 'Biliner'; did you mean 'Bilinear'"):
        _units(network, Plugin(by_name, ["Biliner"]))


@pytest.mark.parametrize("count", [1, 2, 3, 178, 179, 180])
@pytest.mark.parametrize("size", [1, 7, 89, 256])
def test_passes_are_the_most_batches_of_any_process(count: int, size: int) -> None:
    samples = torch.arange(count).numpy()
    shards = [ShardedSampler(rank=rank, world_size=3, group_size=1) for rank in range(3)]
    found = [len(list(each.evaluation(samples, size))) for each in shards]
    assert [each.evaluation_passes(samples, size) for each in shards] == [max(found)] * 3


def test_moments_are_laid_out_as_fused_kernels_take_them() -> None:
    """A contiguous state in channels_last weights, as from a sharded run into a whole one."""

    def trained(memory_format: torch.memory_format, steps: range, saved: Any = None) -> Any:
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        if saved is not None:
            layer.load_state_dict(saved["model"])
            load_full_optimizer_state(optimizer, saved["optimizer"])
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            layer(torch.randn(2, 3, 5, 5)).square().sum().backward()
            optimizer.step()
        return copy.deepcopy({"model": layer.state_dict(), "optimizer": optimizer.state_dict()})

    whole = trained(torch.contiguous_format, range(6))
    half = trained(torch.contiguous_format, range(3))
    again = trained(torch.channels_last, range(3, 6), half)
    moments = again["optimizer"]["state"][0]["exp_avg"]
    assert moments.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(again["model"], whole["model"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "mnasnet1_0", "legacy_xception"])
def test_networks_of_the_libraries_learn_the_same_sharded(
    name: str, digits: Path, tmp_path: Path
) -> None:
    """Attention that reads its layers' weights, views that are changed in place, and others."""
    spawn(work_on_network, (digits, tmp_path, name), WORLD)
    for rank in range(WORLD):
        seen = load_tensors(tmp_path / f"{name}.{rank}.pth")
        whole, sharded = seen["whole"], seen["sharded"]
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        # after a step: so the gradients were the same
        assert sharded["scores"][0]["loss"] == pytest.approx(whole["scores"][0]["loss"], rel=1e-4)
        own = sum(size for _, size, _ in sharded["held"])
        assert own == pytest.approx(sum(size for _, size, _ in whole["held"]) / 2, rel=0.02)
