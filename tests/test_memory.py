"""The trial before the first step: what it concludes, and that it leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distcls.errors import DistclsError
from distcls.models import factory
from distcls.models.config import ModelConfig
from distcls.training.distributed import start
from distcls.training.engine import Engine
from distcls.training.inputs import choose_preprocess, open_input
from distcls.training.memory import explain_out_of_memory, fit_into_memory, is_out_of_memory
from tests.plain import plain_config

HUGE = 1 << 60


def make_engine(digits: Path, batch_size: int = 20) -> Engine:
    """An engine over the default network: batch norm, dropout."""
    config = plain_config(
        data=digits, out=digits / "unused", batch_size=batch_size, limit=40, auto_micro_batch=True
    )
    accelerator = start(config)
    data = open_input(config)
    preprocess = choose_preprocess(config.input, data.train, None)
    model = factory.build(ModelConfig(), len(data.classes), preprocess)
    return Engine(config, accelerator, data, model, preprocess)


def test_a_trial_that_fits_leaves_no_trace(digits: Path) -> None:
    engine = make_engine(digits)
    engine._model.eval()
    before = {name: tensor.clone() for name, tensor in engine._model.state_dict().items()}
    random = torch.get_rng_state()
    fit_into_memory(engine)
    assert engine.micro_batching.accumulate == 1
    assert torch.equal(torch.get_rng_state(), random)
    after = engine._model.state_dict()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    assert all(parameter.grad is None for parameter in engine._model.parameters())
    assert not any(module.training for module in engine._model.modules())


def test_the_micro_batch_is_halved_until_it_fits(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine(digits)
    tried: list[int] = []

    def needs_room(images: int) -> float:
        tried.append(images)
        if engine.micro_batching.size > 5:
            torch.empty(HUGE, dtype=torch.uint8)  # really refused by the allocator
        return 0.0

    monkeypatch.setattr(engine, "trial_step", needs_room)
    fit_into_memory(engine)
    # a quarter more than the micro-batch of 20, 10 and 5
    assert (tried, engine.micro_batching.accumulate) == ([25, 13, 7], 4)
    assert (
        "20 images at a time do not fit into memory: reduced to 5, in 4 micro-batches"
        in capsys.readouterr().err
    )


def test_no_micro_batch_of_one_image(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(digits)
    monkeypatch.setattr(engine, "trial_step", lambda _: torch.empty(HUGE, dtype=torch.uint8))
    with pytest.raises(DistclsError, match=r"out of memory with 3 images .* two in every micro"):
        fit_into_memory(engine)


def test_which_errors_are_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(HUGE, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_other_errors_keep_their_traceback(digits: Path) -> None:
    engine = make_engine(digits)
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(engine._config, engine):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with (
        pytest.raises(DistclsError, match="out of memory with 20 images"),
        explain_out_of_memory(engine._config, engine),
    ):
        torch.empty(HUGE, dtype=torch.uint8)
