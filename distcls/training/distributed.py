"""Processes, device, precision and threads of a run; sums and batch norm over all processes.

torch.nn.SyncBatchNorm refuses CPU tensors; `CpuSyncBatchNorm` is its counterpart for them.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast,
    reduce,
)
from torch import Tensor, nn

from distcls.errors import BadValue, DistclsError, UsageError
from distcls.log import world_size
from distcls.system import available_cores, hand_back_freed_memory, keep_freed_memory
from distcls.training.config import TrainConfig
from distcls.training.fsdp import require_shardable


def start(config: TrainConfig) -> Accelerator:
    """Join the other processes and set up device, precision and threads.

    Raises UsageError if the number of processes is not the configured one, if the device lacks the
    precision, or if the weights are to be sharded with options that exclude it.
    """
    check_processes(config.processes)
    precision = choose_precision(config.precision)
    require_shardable(config, precision)
    if config.auto_micro_batch:
        hand_back_freed_memory()
    else:
        keep_freed_memory()
    # torch's default buckets copy every gradient once more
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers = [parallel, process_group_timeout(config.collective_timeout)]
    mixed = "no" if precision == "fp32" else precision
    # accelerate keeps the precision of an earlier run of this process, and refuses any other
    AcceleratorState._reset_state()
    # without cpu=True, accelerate ignores the other processes on a machine that has no GPU
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision=mixed,
        cpu=cpu,
        kwargs_handlers=handlers,
        log_with=config.tracker,
        project_dir=config.out,
    )
    # after accelerate, which takes all cores where the launcher left OMP_NUM_THREADS open, as
    # torchrun does with one process per machine
    set_threads(config.threads)
    if accelerator.num_processes != world_size():
        raise DistclsError(
            f"{world_size()} processes were started, but accelerate sees "
            f"{accelerator.num_processes}; each would train and write alone"
        )
    return accelerator


def check_processes(wanted: int | None) -> None:
    """Raise UsageError if the number of processes is not the one that the config requires."""
    found = world_size()
    if wanted is not None and found != wanted:
        raise UsageError(
            f"processes: {wanted} asked for, {found} running; start them with "
            f"`accelerate launch --multi_gpu --num_processes {wanted} -m distcls.train ...` "
            "(with --multi_gpu also on CPUs)"
        )
    # accelerate's launcher sets a rendezvous address for N processes, then starts a single one
    # where it finds neither GPUs nor mpirun (1.15: --cpu --num_processes 2)
    rendezvous = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if rendezvous and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate was told to start several processes but started one; on CPUs add "
            "--multi_gpu, or use `torchrun --standalone --nproc_per_node N -m distcls.train ...`"
        )


def process_group_timeout(seconds: float) -> InitProcessGroupKwargs:
    """The timeout of collective operations.

    Without it gloo waits half an hour, NCCL 10 minutes. A process group that a launcher (Ray) has
    made already keeps its own.
    """
    # accelerate 1.15 drops a limit that equals its default (600 s), whatever the backend's is, so
    # gloo would take its half hour
    return InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=seconds, microseconds=1))


@contextlib.contextmanager
def explain_lost_processes(limit: float) -> Iterator[None]:
    """Turn the failure of a collective operation into a DistclsError.

    Its cause is another process, which may have printed an error of its own.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's and the store's have their own class, gloo's only a file name in the message
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()):
            raise
        what = (str(error).splitlines() or [""])[0].strip()
        raise DistclsError(
            f"another process is gone, or did not answer within {limit:.0f} s "
            f"(collective_timeout): {what}; --resume auto continues from the last state"
        ) from error


def choose_precision(wanted: str) -> str:
    """`fp32`, `bf16` or `fp16`. Raises BadValue if the device does not support it."""
    cuda = torch.cuda.is_available()
    if wanted == "auto":
        launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launcher in ("bf16", "fp16"):
            wanted = launcher
        elif not cuda:
            return "fp32"
        else:
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and not cuda:
        raise BadValue("precision", wanted, "auto, fp32 or bf16: fp16 needs a GPU")
    return wanted


def set_threads(wanted: int | None) -> None:
    """Divide the cores among this machine's processes (launchers leave one thread to each)."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(wanted or max(1, available_cores() // local))


def any_process(*flags: bool) -> list[bool]:
    """For each flag, whether any process has set it. All processes have to call this."""
    state = PartialState()
    if state.num_processes == 1:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.float32, device=state.device)
    return [bool(count) for count in reduce(raised, reduction="sum").tolist()]


def sum_over_processes(term: Tensor) -> float:
    """The sum of each process's term, []. All processes have to call this."""
    return float(reduce(term, reduction="sum"))


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
