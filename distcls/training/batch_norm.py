"""Batch norm: its running statistics from the first step on, and over all processes.

torch.nn.SyncBatchNorm refuses CPU tensors; `CpuSyncBatchNorm` is its counterpart for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import broadcast
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of all batch norms, torchvision's and timm's."""


class RunningStatistics:
    """Has the running statistics of batch norms be those of the batches seen, from the first on.

    They start as zeros and ones, of which a momentum of 0.1 still leaves a third after 10 batches,
    and a stack of fifty norms multiplies such errors: networks were at chance in evaluation for
    their first 60 to 80 steps. So, as in Adam's bias correction, the n-th batch counts with
    max(momentum, 1/n): a plain mean at first, a moving average from then on.

    n is a norm's own count, `num_batches_tracked`: a layer that was frozen begins when it first
    learns, pretrained statistics count with the batches that they are of, and a resumed run goes
    on from its state.
    """

    def __init__(self, model: nn.Module, *, correct_bias: bool = True) -> None:
        """`correct_bias` False leaves every norm's momentum as it is."""
        self._momentum: dict[BatchNorm, float] = {
            module: module.momentum
            for module in model.modules()
            if correct_bias
            and isinstance(module, BatchNorm)
            and module.momentum is not None
            and module.num_batches_tracked is not None
        }
        self._settling: dict[BatchNorm, int] = {}
        """Batches so far of the norms whose statistics are still a plain mean."""
        self.recount()

    def recount(self) -> None:
        """Read the counts anew, once the buffers were changed; synchronises with a GPU."""
        tracked = [
            count for norm in self._momentum if (count := norm.num_batches_tracked) is not None
        ]
        counts = torch.stack(tracked).tolist() if tracked else []
        self._settling = dict(zip(self._momentum, counts, strict=True))

    def before_batch(self) -> bool:
        """Set the momentum for the next batch; whether any norm's differs from its usual one."""
        changed = False
        for norm in [norm for norm in self._settling if norm.training]:
            self._settling[norm] += 1
            mean = 1 / self._settling[norm]
            norm.momentum = max(self._momentum[norm], mean)
            if mean > self._momentum[norm]:
                changed = True
            else:
                del self._settling[norm]
        return changed


class _BatchStatistics(NamedTuple):
    """Statistics of one batch over all processes."""

    mean: Tensor
    """Of each channel, [C]."""
    variance: Tensor
    """The biased one, [C]."""
    values: float
    """How many a channel has."""


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics, in training, are those of all processes' batches combined.

    The processes' batches may differ in size. Parameters, buffers and their names are those of
    nn.BatchNorm2d, and so is all it does in evaluation or in a single process. In training every
    process has to call forward and backward, in the same order.
    """

    @classmethod
    def of(cls, norm: nn.BatchNorm2d) -> CpuSyncBatchNorm:
        """The same layer, synchronised; it holds the very tensors of `norm`."""
        sync = cls(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            device="meta",  # nothing is allocated: the tensors are replaced at once
        )
        sync._parameters.update(norm._parameters)
        sync._buffers.update(norm._buffers)
        sync._modules.update(norm._modules)
        return sync.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] of floats to the same shape. Raises ValueError for one value per channel."""
        if not self.training or not _is_distributed():
            return super().forward(input)
        self._check_input_dim(input)
        batch = _global_statistics(input)
        if batch.values <= 1:
            raise ValueError("batch norm needs more than one value a channel over all processes")
        self._track(batch.mean, batch.variance * (batch.values / (batch.values - 1)))
        output: Tensor = _Normalise.apply(input, self.weight, self.bias, batch, self.eps)
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Let the running statistics follow; they hold the unbiased variance."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # torch's meaning of it: the plain average of all batches
            momentum = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class CpuSyncBatchNormAct(CpuSyncBatchNorm):
    """timm's BatchNormAct2d, synchronised: dropout and activation follow the normalisation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] of floats to the same shape."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


def convert_sync_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Replace, in place, every batch norm of `model` by one over all processes."""
    if device.type != "cpu":
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        if any(map(_activates, model.modules())):
            import timm.layers

            convert = timm.layers.convert_sync_batchnorm  # torch's would lose the activations
        for name, child in list(model.named_children()):
            setattr(model, name, convert(child))
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, CpuSyncBatchNorm.of(child))
            elif isinstance(child, nn.BatchNorm2d) and _activates(child):
                setattr(module, name, CpuSyncBatchNormAct.of(child))


@torch.no_grad()
def broadcast_buffers(*models: nn.Module) -> None:
    """Send the main process's running statistics to all.

    Each process has its own from the images it saw. DDP broadcasts the main process's at every
    forward pass, and a state holds only these, so a resumed run continues as this one does.
    """
    if not _is_distributed():
        return
    for model in {id(model): model for model in models}.values():
        for buffer in model.buffers():
            broadcast(buffer)


def _activates(module: nn.Module) -> bool:
    """Whether it is a batch norm with an activation inside."""
    return isinstance(module, nn.BatchNorm2d) and set(module._modules) == {"drop", "act"}


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, mean and variance being functions of x.

    The gradient of x through the statistics needs two sums over all processes (Ioffe, Szegedy:
    Batch Normalization, 2015, section 3). Gradients of weight and bias stay this process's own, for
    DDP to add up. torch's kernels for given statistics do the passes over the images.
    """

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        x, weight, bias, batch, eps = given
        ctx.save_for_backward(x, weight, batch.mean, batch.variance)
        ctx.values, ctx.eps = batch.values, eps
        return F.batch_norm(x, batch.mean, batch.variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        # with given statistics: dx lacks the way through them, dw = sum(dy * x_hat), db = sum(dy)
        dx, dw, db = torch.ops.aten.native_batch_norm_backward(
            gradients[0], x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([db, dw]).to(torch.float64)
        dist.all_reduce(sums)
        through_mean, through_variance = (sums / ctx.values).to(mean.dtype)
        # dx -= weight / std * (mean(dy) + x_hat * mean(dy * x_hat)): again a batch norm of x
        scale = torch.rsqrt(variance + ctx.eps)
        if weight is None:
            dw = db = None
        else:
            scale = scale * weight
        slope, offset = scale * through_variance, scale * through_mean
        dx -= F.batch_norm(x, mean, variance, slope, offset, training=False, eps=ctx.eps)
        return dx, dw, db, None, None


@torch.no_grad()
def _global_statistics(x: Tensor) -> _BatchStatistics:
    """The statistics of `x`, [N, C, H, W], over all processes.

    Each process's own are merged (Chan, Golub, LeVeque: Algorithms for Computing the Sample
    Variance, 1983), in the order of the ranks: every process gets the same bits.
    """
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    variance, mean = torch.var_mean(x.to(precision), dim=(0, 2, 3), correction=0)
    count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64)
    own = torch.cat([mean.double(), variance.double(), count])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    table, channels = torch.stack(gathered), len(mean)
    means, variances, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
    weights = counts / counts.sum()
    merged = (weights * means).sum(0)
    spread = (weights * (variances + (means - merged) ** 2)).sum(0)
    return _BatchStatistics(merged.to(precision), spread.to(precision), float(counts.sum()))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
