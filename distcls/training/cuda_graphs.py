"""The forward and backward pass as CUDA graphs: recorded once, launched by two calls from then on.

A step of MobileNetV3 on small images takes an H200 some 5 ms, and the host 20 to 40 ms, which
launches its thousand kernels one by one. `torch.cuda.make_graphed_callables` would record them too;
but autograd then still visits each parameter after a replay, and the loader's threads, which pin
memory, can break a recording.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from distcls.log import say
from distcls.training.batch_norm import BatchNorm

WARM_UP = 3
"""Passes before recording, in which libraries choose kernels and allocate workspaces."""
MOST = 2
"""Shapes that are recorded at most; the batches of a run differ by one image."""
MARGIN = 1.1
"""Memory that has to be free, as a multiple of what the graphs and a pass without them take."""


class GraphedModel:
    """A model in training, called through CUDA graphs where that is possible.

    A shape of input is recorded once it comes for the second time; all others pass through the
    model itself. When parameters are frozen or freed, all are recorded anew. The gradients become
    `grad` without being added to any that are there: one pass a step.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        bare: nn.Module,
        unchanged: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`model` is called, in its wrappers; `bare` the one within. `unchanged` is a context
        manager that puts back buffers and random states."""
        self._model = model
        self._bare = bare
        self._unchanged = unchanged
        self._parameters = list(bare.parameters())
        self._norms = [module for module in bare.modules() if isinstance(module, BatchNorm)]
        self._seen: dict[tuple[Any, ...], _Recorded | None] = {}
        """The graphs by shape and dtype; None for what came once."""
        self._state: list[bool] = []
        """Which parameters are trained, and which norms are in training, in all of them."""
        self._stream: torch.cuda.Stream | None = None
        """Recorded on; memory is shared between graphs of one stream only."""
        self._off = self._said = False

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch, [B, classes]."""
        if self._off:
            return self._model(images)
        state = [each.requires_grad for each in self._parameters]
        state += [norm.training for norm in self._norms]
        if state != self._state:
            self._seen, self._state = {}, state
        key = (images.shape, images.dtype)
        if key in self._seen and self._seen[key] is None:
            self._seen[key] = self._record(images)
        elif key not in self._seen and len(self._seen) < MOST:
            self._seen[key] = None
        recorded = self._seen.get(key)
        return self._model(images) if recorded is None else recorded(images)

    def _record(self, images: Tensor) -> _Recorded | None:
        """The passes over such a batch; None, with all others from then on, where that fails."""
        graphs = [each for each in self._seen.values() if each is not None]
        reason = None if graphs else self._reason_against(images.device)
        if reason is None:
            pool = graphs[0].pool if graphs else torch.cuda.graph_pool_handle()
            try:
                recorded = self._recording(images, pool)
            except RuntimeError as error:  # of CUDA, out of memory, or of what reads a value
                while isinstance(error.__context__, RuntimeError):
                    error = error.__context__
                reason = f"recording failed: {str(error).strip().splitlines()[0]}"
            else:
                if not self._said:
                    say("CUDA graphs: forward and backward pass are recorded")
                self._said = True
                return recorded
        self._off, self._seen = True, {}
        gc.collect()  # a pass that is still alive would give its stream to the next
        torch.cuda.empty_cache()
        say(f"CUDA graphs: off; {reason}")
        return None

    def _recording(self, images: Tensor, pool: Any) -> _Recorded:
        """The graphs of such a batch. A failure leaves streams and random numbers as they were."""
        trained = [each for each in self._parameters if each.requires_grad]
        index = torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        before = generator.clone_state()
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(torch.cuda.current_stream()):
            with self._unchanged():
                _warm_up(self._model, images, trained, self._stream)
            try:
                return _Recorded(self._model, images, trained, self._stream, pool)
            except RuntimeError:
                generator.graphsafe_set_state(before)  # its own still waits for the recording
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(index, pool)
                raise

    def _reason_against(self, device: torch.device) -> str | None:
        """Why nothing can be recorded, if so."""
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(module, name) for module in self._bare.modules() for name in hooks):
            return "the network has hooks, which are called in a pass and not in a recorded one"
        allocated = torch.cuda.memory_allocated(device)
        idle = torch.cuda.memory_reserved(device) - allocated
        free = torch.cuda.mem_get_info(device)[0] + idle
        needed = round(2 * MARGIN * (torch.cuda.max_memory_allocated(device) - allocated))
        if free < needed:
            gib = 2**30
            return f"they need {needed / gib:.1f} GiB of memory, {free / gib:.1f} are free"
        return None


def _warm_up(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    trained: Sequence[Tensor],
    stream: torch.cuda.Stream,
) -> None:
    """A few passes on the stream. Raises RuntimeError if the last one waits for the device: a
    recording that fails leaves more behind than a pass."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        try:
            for number in range(WARM_UP):
                if number == WARM_UP - 1:
                    torch.cuda.set_sync_debug_mode("error")
                logits = model(images)
                torch.autograd.grad(logits, trained, torch.ones_like(logits), allow_unused=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            current.wait_stream(stream)


class _Recorded:
    """The graphs of one forward and one backward pass, with the tensors they read and write."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        trained: Sequence[Tensor],
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        """`pool` is the memory for what lives within a pass, which one graph at a time uses."""
        self.pool = pool
        self._trained = trained
        self._images = images.clone()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # threads of the loader pin memory meanwhile, which other modes would not allow
        mode = "thread_local"
        with torch.cuda.graph(self._forward, pool, stream, mode):
            logits = model(self._images)
        self._gradient = torch.zeros_like(logits)
        with torch.cuda.graph(self._backward, pool, stream, mode):
            found = torch.autograd.grad(logits, trained, self._gradient, allow_unused=True)
            # fused optimisers take gradients that lie in memory as their parameters do
            self._gradients = [
                gradient
                if gradient is None or gradient.stride() == parameter.stride()
                else torch.empty_like(parameter).copy_(gradient)
                for gradient, parameter in zip(found, trained, strict=True)
            ]
        self._logits = logits.detach()
        self._anchor = torch.zeros((), device=images.device, requires_grad=True)

    def __call__(self, images: Tensor) -> Tensor:
        self._images.copy_(images)
        logits: Tensor = _Replay.apply(self._anchor, self)
        return logits

    def forward(self) -> Tensor:
        self._forward.replay()
        return self._logits.clone()

    def backward(self, gradient: Tensor) -> None:
        """Set the gradients of the parameters."""
        self._gradient.copy_(gradient)
        self._backward.replay()
        for parameter, own in zip(self._trained, self._gradients, strict=True):
            parameter.grad = own


class _Replay(torch.autograd.Function):
    """Where a recorded pass stands in the graph of autograd: between the anchor and the logits."""

    @staticmethod
    def forward(context: Any, anchor: Tensor, recorded: _Recorded) -> Tensor:
        context.recorded = recorded
        return recorded.forward()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[None, None]:
        context.recorded.backward(gradient)
        return None, None
