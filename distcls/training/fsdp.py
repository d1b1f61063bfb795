"""FSDP: weights, gradients and moments sharded over the processes, gathered where needed.

Accelerate launches such a run and configures the sharding (`launch/fsdp.yaml`); torch's
`fully_shard` (FSDP2) does it. `Accelerator.prepare` (1.15) would do it too, but on GPUs alone: on
CPUs it silently takes DDP, and nothing here could be tried without a GPU. It also wraps single
layers, whose weights the module around them may read itself (torch's MultiheadAttention does), and
its mixed precision casts the weights of batch norm away from its statistics. Autocast, as under
DDP, leaves them as they are.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    convert_to_fp32,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from distcls.errors import UsageError, did_you_mean
from distcls.log import world_size
from distcls.models.classifier import Classifier
from distcls.stored import number, require_fit
from distcls.training.config import OPTIMIZERS, TrainConfig

KERNELS = ("fused", "foreach")
"""Keys of an optimiser's parameter groups that choose its kernels, not its result."""


def local_shard(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, in the same memory; a tensor that is not sharded itself.

    To be called without gradients.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, which all processes have to call; any other itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full(value: Any, *, keep: bool) -> Any:
    """`value`, nested as it is, with the full tensor of each sharded one, in main memory.

    All processes have to call this. Where `keep` is False None stands for the full tensor, so that
    a process that has no use for it holds one at a time.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        found = copy.copy(value)  # a state dict has its modules' versions with it
        found.update({key: gather_full(item, keep=keep) for key, item in value.items()})
        return found
    if isinstance(value, list | tuple):
        return type(value)(gather_full(item, keep=keep) for item in value)
    return value


def load_full_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict` of full tensors, into a model that may be sharded."""
    own = model.state_dict()
    shards = copy.copy(own)  # with the modules' versions, which some read; a state holds none
    shards.clear()
    shards.update({name: _laid_out_like(own.get(name), item) for name, item in tensors.items()})
    model.load_state_dict(shards)


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` of full tensors, whose parameters may be sharded.

    Which kernels it computes with, and how its tensors lie in memory, stays as it is here: the
    state may come from a run that was sharded where this one is not, or the other way round. Raises
    Unfit for a tensor that does not fit its parameter: torch compares none, and fused kernels walk
    past the end of a shorter one.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    state, groups = dict(saved["state"]), []
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        _require_same_options(group, own)
        groups.append(group | {key: own[key] for key in KERNELS if key in own})
        for index, parameter in zip(group["params"], own["params"], strict=True):
            if index in state:
                values = state[index].items()
                _require_fitting(inner, state[index], parameter.shape, f"state of {index}")
                state[index] = {key: _laid_out_like(parameter, value) for key, value in values}
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})


OPTIONS = ("lr_scale", "weight_decay", "betas", "eps", "momentum", "alpha", "nesterov")
"""Keys of parameter groups that follow from the config, which is the same in a resumed run."""
COUNTERS = ("step", "mu_product", "eta", "mu")
"""Keys of torch's optimisers whose values are one number, whatever the shape of the parameter."""
MOMENTS = (
    *("exp_avg", "exp_avg_diff", "exp_avg_var", "exp_inf", "max_exp_avg_sq", "momentum_buffer"),
    *("square_avg", "grad_avg", "sum", "acc_delta", "lookahead_slow_buff"),
)
"""Keys that mean a tensor of the parameter's shape in the optimisers of any library."""
NEEDED: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),  # AdamW is one
    torch.optim.RAdam: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.RMSprop: ("step", "square_avg"),
}
"""What the state of a parameter that has been updated holds at least."""


def _require_same_options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for key in OPTIONS:
        if key in own:
            found = tuple(saved[key]) if isinstance(saved[key], list) else saved[key]
            same = type(found) in (int, float, bool, tuple) and found == own[key]
            require_fit(same, f"{key} of the optimizer", found, f"{own[key]} as in the config")


def _require_fitting(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], shape: torch.Size, where: str
) -> None:
    base = getattr(optimizer, "_base_optimizer", optimizer)  # within timm's Lookahead
    torchs = isinstance(base, _OF_TORCH)
    needed = (keys for kind, keys in NEEDED.items() if isinstance(base, kind))
    missing = [key for keys in needed for key in keys if state and key not in state]
    require_fit(not missing, where, list(state), f"a value for {', '.join(missing)}")
    for key, value in state.items():
        place = f"{key} in the {where}"
        if key in COUNTERS:
            count = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            number(0, 2.0**48)(count, place)
        elif isinstance(value, Tensor) and (key in MOMENTS or (torchs and not factored(key))):
            found = list(value.shape)
            require_fit(value.shape == shape, place, found, f"the shape {list(shape)}")


_OF_TORCH = tuple(
    each
    for each in vars(torch.optim).values()
    if isinstance(each, type) and each is not torch.optim.Optimizer
)


def factored(key: str) -> bool:
    """Whether a moment is kept as a row and a column, as Adafactor does."""
    return key in ("row_var", "col_var")


def _laid_out_like(own: Any, value: Any) -> Any:
    """`value` sharded and lying in memory as `own` is, if they are tensors of one shape.

    Fused kernels walk through the memory of a parameter and its moments, whatever their strides.
    """
    alike = isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape
    if not alike:
        return value
    if isinstance(own, DTensor):
        # every process has read the full tensor, so nothing has to be sent; the copy frees it
        mesh, placements = own.device_mesh, own.placements
        shard = distribute_tensor(value.contiguous(), mesh, placements, src_data_rank=None)
        return shard.clone()
    if own.stride() == value.stride():
        return value
    return torch.empty_like(own, dtype=value.dtype, device=value.device).copy_(value)


REFUSED_SETTINGS = {
    "offload_params": "weights in main memory are not gathered here",
    "cpu_ram_efficient_loading": "every process builds the same weights, there is nothing to send",
    "activation_checkpointing": "dropout would drop others in the second forward pass",
}
"""Settings of accelerate's `fsdp_config`, without their prefix, that must not be true."""


def is_requested() -> bool:
    """Whether accelerate's launcher is configured to shard."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def require_shardable(config: TrainConfig, precision: str) -> None:
    """Raise UsageError if FSDP was requested with options that it does not support."""
    if is_requested():
        for reason in _reasons_against(config, precision):
            raise UsageError(f"FSDP: {reason}")


def _reasons_against(config: TrainConfig, precision: str) -> Iterator[str]:
    if world_size() == 1:
        yield (
            "there is one process, and nothing to shard its weights over; start two or more, or "
            "use launch/one_process.yaml"
        )
    alone = "passes of each process alone, and sharded weights take all processes"
    if config.auto_micro_batch:
        yield f"auto_micro_batch tries {alone}; choose --accumulate yourself"
    if config.compile:
        yield f"compile times {alone}; leave --compile off"
    if config.optimizer.name not in OPTIMIZERS.names():
        choices = ", ".join(OPTIMIZERS.names())
        yield f"optimizer.name: {config.optimizer.name} may need full weights; choose {choices}"
    if precision == "fp16":
        yield "precision: the gradient scaling of fp16 takes full gradients; choose bf16 or fp32"
    if os.environ.get("FSDP_VERSION", "1") != "2":
        yield "fsdp_version 1 is deprecated in PyTorch; set fsdp_version: 2, as launch/fsdp.yaml"
    for name, reason in REFUSED_SETTINGS.items():
        if parse_flag_from_env(f"FSDP_{name.upper()}"):
            yield f"fsdp_{name}: {reason}; set it to false"


class Sharding:
    """What differs in a run whose weights are sharded (`on`).

    In any other run each method does the default for one process or DDP.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.on = is_requested()
        self._accelerator = accelerator

    def place(self, model: Classifier, memory_format: str) -> Classifier:
        """The model on the device and in a memory format; where it is to be sharded still in main
        memory (in full it need not fit on the device), and contiguous: FSDP2 shards nothing
        else."""
        if self.on:
            return model.to(memory_format=torch.contiguous_format)
        model = model.to(self._accelerator.device)
        last = memory_format == "channels_last"
        return model.to(memory_format=torch.channels_last) if last else model

    def prepare(
        self, model: Classifier, optimizer: torch.optim.Optimizer, averages: Sequence[Classifier]
    ) -> tuple[Any, Any]:
        """The model in its wrappers and its optimiser, which has not stepped yet; the averages of
        the model are sharded in the same way.

        Raises UsageError for a network that cannot be sharded.
        """
        if not self.on:
            wrapped, prepared = self._accelerator.prepare(model, optimizer)
            return wrapped, prepared
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = []  # or it would keep the full ones in memory
        for each in (model, *averages):
            self._shard(each)
        shards = dict(model.named_parameters())
        for group, own in zip(optimizer.param_groups, held, strict=True):
            group["params"] = [shards[name] for name in own]
        wrapped = _Autocast(model, self._accelerator)
        return wrapped, self._accelerator.prepare_optimizer(optimizer)

    @contextlib.contextmanager
    def evaluating(
        self, models: Sequence[Classifier], passes: int, size: tuple[int, int]
    ) -> Iterator[Callable[[Tensor], list[Tensor]]]:
        """The forward pass of evaluation, of each model, without gradients and without autocast.

        Sharded weights are gathered by all processes at once, so each has to make `passes` passes
        in all; those that are missing at the end are made here, on a black image of `size`.
        """
        for model in models:
            model.eval()
        if not self.on:
            with torch.inference_mode():
                # the class's own forward: prepare() put autocast around the instance's
                yield lambda images: [Classifier.forward(model, images) for model in models]
            return
        made = 0

        def forward(images: Tensor) -> list[Tensor]:
            nonlocal made
            made += 1
            return [model(images) for model in models]

        with torch.no_grad():  # weights gathered in inference mode could not be trained any more
            yield forward
            black = torch.zeros(1, *size, 3, dtype=torch.uint8, device=self._accelerator.device)
            while made < passes:
                forward(black)
        for model in models:
            _release(model)

    def _shard(self, model: Classifier) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for name, parameter in model.named_parameters():
            if parameter.ndim == 0:
                raise UsageError(
                    f"FSDP: {name} of this network is a single number, which cannot be "
                    "sharded; choose another --model.name"
                )
        plugin = FullyShardedDataParallelPlugin()  # as set in the launcher's environment
        device, processes = self._accelerator.device.type, self._accelerator.num_processes
        mesh = init_device_mesh(device, (processes,))
        for unit in _units(model, plugin):
            unit.register_forward_hook(_no_views)
            fully_shard(unit, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
        model.register_forward_hook(_no_views)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule) and device == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no mean


class _Autocast(nn.Module):
    """A sharded model in training: its forward pass in mixed precision, its logits in fp32.

    Around a model that is not sharded accelerate puts the same. Evaluation takes the model itself.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        super().__init__()
        self._model = model
        self._accelerator = accelerator

    def forward(self, images: Tensor) -> Any:
        """Images uint8 or float [B, H, W, 3] to logits [B, classes]."""
        with self._accelerator.autocast():
            return convert_to_fp32(self._model(images))


def _no_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Copies of those outputs of a module that are views.

    Changing a view in place, as a `ReLU(inplace=True)` after the module does, cuts off the
    hook by which FSDP2 gathers the weights for the backward pass.
    """
    if isinstance(output, Tensor):
        view = torch.is_grad_enabled() and output._base is not None
        return output.clone() if view else output
    if isinstance(output, dict):
        return {key: _no_views(module, inputs, item) for key, item in output.items()}
    if type(output) in (list, tuple):
        return type(output)(_no_views(module, inputs, item) for item in output)
    return output


def _release(model: nn.Module) -> None:
    """Free weights that a pass without a backward pass has left gathered: in full, they would
    stay in memory while training continues."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _units(model: Classifier, plugin: Any) -> list[nn.Module]:
    """The modules whose weights are gathered at once, inner ones first; the rest is one more.

    Raises UsageError for a class name of the launcher's that the network does not have.
    """
    from torch.distributed.fsdp.wrap import (
        size_based_auto_wrap_policy,
        transformer_auto_wrap_policy,
    )

    if plugin.auto_wrap_policy is size_based_auto_wrap_policy and plugin.min_num_params:
        return _units_by_size(model.backbone, plugin.min_num_params)
    if plugin.auto_wrap_policy is not transformer_auto_wrap_policy:
        return []
    names = plugin.transformer_cls_names_to_wrap or []
    known = {type(module).__name__ for module in model.modules()}
    for name in names:
        if name not in known:
            hint = did_you_mean(name, sorted(known))
            raise UsageError(f"fsdp_transformer_layer_cls_to_wrap: no layer is a {name!r}{hint}")
    return [m for m in reversed(list(model.modules())) if type(m).__name__ in names]


def _units_by_size(network: nn.Module, least: int) -> list[nn.Module]:
    """The smallest modules within the network with `least` parameters outside of other units.

    Only those that are called themselves: not a mere list of modules, and not a single layer, whose
    weight the module around it may read without calling it.
    """
    units: list[nn.Module] = []
    taken: set[int] = set()

    def visit(module: nn.Module) -> None:
        for child in module.children():
            visit(child)
        called = type(module).forward is not nn.Module.forward
        if module is network or not called or not any(True for _ in module.children()):
            return
        free = [p for p in module.parameters() if id(p) not in taken]
        if free and sum(parameter.numel() for parameter in free) >= least:
            units.append(module)
            taken.update(map(id, free))

    visit(network)
    return units
