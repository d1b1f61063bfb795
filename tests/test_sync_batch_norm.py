"""Batch norm over several processes against torch's own on the whole batch."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from distcls.training.batch_norm import CpuSyncBatchNorm, convert_sync_batch_norm
from distcls.training.sampler import shard
from tests.forked import spawn

IMAGES, CHANNELS = 7, 5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def make_norm(dtype: torch.dtype, *, affine: bool = True) -> nn.BatchNorm2d:
    """A batch norm that has seen something already."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(CHANNELS, momentum=0.3, affine=affine).to(dtype)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
    return norm


def make_images(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images whose channels lie far from zero and differ much among each other, and a target."""
    torch.manual_seed(2)
    images = torch.randn(IMAGES, CHANNELS, 3, 4, dtype=torch.float64)
    images += torch.arange(IMAGES).view(-1, 1, 1, 1)
    images *= torch.tensor([0.1, 1.0, 2.0, 5.0, 1.0]).view(1, -1, 1, 1)
    return images.to(dtype), torch.randn_like(images).to(dtype)


def observe(norm: nn.Module, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Two passes in training, with all that they compute and move, then one in evaluation."""
    seen: dict[str, Tensor] = {}
    for number in range(2):
        norm.zero_grad()
        x = (images * (1 + number)).requires_grad_()
        output = norm(x)
        ((output - target) ** 3).sum().backward()
        seen |= {f"output {number}": output.detach(), f"input gradient {number}": _grad(x)}
    seen |= {f"{name} gradient": _grad(p) for name, p in norm.named_parameters()}
    seen |= dict(norm.named_buffers())
    return {**seen, "evaluation": norm.eval()(images).detach()}


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def cases() -> list[tuple[torch.dtype, torch.memory_format, bool]]:
    """Precision, layout, and whether there are a weight and a bias."""
    return [(t, m, affine) for t in TOLERANCE for m in LAYOUTS for affine in (True, False)]


def work(rank: int, world: int, folder: Path) -> None:
    """One process: its share of the images through synchronised norms, for every case."""
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    seen = []
    for dtype, layout, affine in cases():
        images, target = make_images(dtype)
        mine = shard(np.arange(IMAGES), rank, world)
        model = nn.Sequential(make_norm(dtype, affine=affine))
        convert_sync_batch_norm(model, torch.device("cpu"))
        own = images[mine].contiguous(memory_format=layout)
        seen.append(observe(model[0], own, target[mine]))
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, Tensor]]]:
    """What each of 2 or 4 processes saw."""
    folder = tmp_path_factory.mktemp("norms")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        spawn(work, (request.param, folder), request.param)
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def whole(name: str, shards: list[Tensor]) -> Tensor:
    """What the processes' shards amount to: images in their places, parameters' gradients added."""
    if shards[0].ndim == 4:
        joined = torch.empty(IMAGES, *shards[0].shape[1:], dtype=shards[0].dtype)
        for rank, shard_ in enumerate(shards):
            joined[rank :: len(shards)] = shard_
        return joined
    if name.endswith("gradient"):
        return torch.stack(shards).sum(0)
    assert all(torch.equal(own, shards[0]) for own in shards), f"{name} differs among processes"
    return shards[0]


@pytest.mark.parametrize(
    "number", range(len(cases())), ids=lambda n: "-".join(map(str, cases()[n]))
)
def test_many_processes_do_what_batch_norm_does_on_the_whole_batch(
    number: int, seen: list[list[dict[str, Tensor]]]
) -> None:
    dtype, layout, affine = cases()[number]
    images, target = make_images(dtype)
    norm = make_norm(dtype, affine=affine)
    expected = observe(norm, images.contiguous(memory_format=layout), target)
    assert {"output 1", "input gradient 1", "running_var", "evaluation"} < set(expected)
    assert ("weight gradient" in expected) == affine
    for name, reference in expected.items():
        own = whole(name, [process[number][name] for process in seen])
        bound = TOLERANCE[dtype] * max(1.0, float(reference.abs().max()))
        worst = float((own - reference).abs().max())
        assert worst <= bound, name


def test_layout_is_kept(seen: list[list[dict[str, Tensor]]]) -> None:
    for number, (_, layout, _) in enumerate(cases()):
        for name in ("output 1", "input gradient 1"):
            assert seen[0][number][name].is_contiguous(memory_format=layout)


def network() -> nn.Sequential:
    """Norms at two depths, and a linear layer."""
    inner = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.BatchNorm2d(CHANNELS))
    return nn.Sequential(inner, nn.BatchNorm2d(CHANNELS), nn.Flatten(), nn.Linear(20, 2))


def test_conversion_changes_no_name_and_no_tensor() -> None:
    model = network()
    before: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    convert_sync_batch_norm(model, torch.device("cpu"))
    after: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert sum(isinstance(module, CpuSyncBatchNorm) for module in model.modules()) == 2
    network().load_state_dict(model.state_dict())


def test_conversion_for_gpus_is_torchs_own() -> None:
    model = network()
    convert_sync_batch_norm(model, torch.device("cuda"))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 2
    network().load_state_dict(model.state_dict())


def norm_with_activation() -> BatchNormAct2d:
    """timm's batch norm, which applies a ReLU too."""
    norm = BatchNormAct2d(CHANNELS, momentum=0.3, act_layer=nn.ReLU)
    norm.load_state_dict(make_norm(torch.float32).state_dict())
    return norm


def test_the_activation_inside_of_timms_norms_stays() -> None:
    images, target = make_images(torch.float32)
    expected = observe(norm_with_activation(), images, target)
    assert float(expected["evaluation"].min()) == 0
    model = nn.Sequential(norm_with_activation())
    convert_sync_batch_norm(model, torch.device("cpu"))
    assert isinstance(model[0], CpuSyncBatchNorm)
    own = observe(model[0], images, target)
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_the_activation_stays_on_gpus_too() -> None:
    model = nn.Sequential(norm_with_activation())
    convert_sync_batch_norm(model, torch.device("cuda"))
    assert isinstance(model[0], nn.SyncBatchNorm)
    assert isinstance(model[0].act, nn.ReLU)


def test_copies_are_independent_and_keep_the_mode() -> None:
    model = network().eval()
    convert_sync_batch_norm(model, torch.device("cpu"))
    assert not any(module.training for module in model.modules())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    assert not [p for p in twin.parameters() if float(p.detach().min()) == 3.0]


def test_a_single_process_is_plain_batch_norm() -> None:
    images, target = make_images(torch.float32)
    expected = observe(make_norm(torch.float32), images, target)
    own = observe(CpuSyncBatchNorm.of(make_norm(torch.float32)), images, target)
    assert all(torch.equal(own[name], expected[name]) for name in expected)
