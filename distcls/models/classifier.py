"""The model: a backbone with its normalisation, and the layer of each of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distcls.imaging import Preprocess


class Classifier(nn.Module):
    """A backbone with its normalisation inside, the same in training, evaluation and ONNX.

    Input: pixels, uint8 or float in 0..255, RGB [N, H, W, 3]. Seen as [N, 3, H, W], such an array
    already lies in memory as channels_last does, so no copy is made to change the layout.
    Output: logits, float [N, classes].
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, backbone: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.backbone = backbone
        mean = torch.tensor(preprocess.mean, dtype=torch.float32).view(1, 3, 1, 1) * 255
        std = torch.tensor(preprocess.std, dtype=torch.float32).view(1, 3, 1, 1) * 255
        # not persistent: the model card carries them
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("inverse_std", 1 / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise and classify."""
        pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        logits: Tensor = self.backbone((pixels - self.mean) * self.inverse_std)
        return logits


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: Classifier, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image of `size` in one forward pass."""
    was_training = model.training
    counter = FlopCounterMode(display=False)
    device = model.mean.device
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, *size, 3, dtype=torch.uint8, device=device))
    model.train(was_training)
    return int(counter.get_total_flops()) // 2


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of the head, the layer that gives the logits.

    That is the module beside `model.backbone`, if one with parameters exists; or what timm
    calls its classifier; or the last module with parameters of its own, as in all of torchvision's.
    """
    inside, prefix = _backbone(model)
    beside = {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    if beside:
        return beside
    classifier: object = getattr(inside, "get_classifier", tuple)()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    return {prefix + name for name in _names_in(inside, heads) or _last_names(inside)}


def depths(model: nn.Module) -> dict[str, int]:
    """The layer that each parameter belongs to, counted from 0 at the pixels; the head's is the
    greatest.

    timm's networks define it themselves (`group_matcher`). In others the layers are the modules in
    their order, lists of modules opened; a norm outside a layer belongs to the layer below it,
    and what no layer holds (a class token) to the lowest.
    """
    inside, prefix = _backbone(model)
    matcher = getattr(inside, "group_matcher", None)
    if matcher is None:
        found = _by_order(inside)
    else:
        from timm.models import group_parameters

        found = group_parameters(inside, matcher(coarse=False), reverse=True)
    depth = {name: found.get(name.removeprefix(prefix), 0) for name, _ in model.named_parameters()}
    head = head_parameters(model)
    beside = any(not name.startswith(prefix) for name in head)
    top = max(depth.values()) + int(beside)
    return depth | dict.fromkeys(head, top)


def _by_order(network: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    layer = -1
    for prefix, unit in _units(network, "", top=True):
        parameters = dict(unit.named_parameters())
        if layer < 0 or any(parameter.ndim > 1 for parameter in parameters.values()):
            layer += 1
        found.update({prefix + name: layer for name in parameters})
    return found


def _units(module: nn.Module, prefix: str, *, top: bool) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if type(child) in CONTAINERS or (top and _holds_a_stack(child)):
            yield from _units(child, f"{prefix}{name}.", top=False)
        elif any(True for _ in child.parameters()):
            yield f"{prefix}{name}.", child


def _holds_a_stack(module: nn.Module) -> bool:
    """Whether a module is itself made of a stack of layers, as a transformer's encoder is."""
    return any(
        type(child) in CONTAINERS and len(list(child.children())) > 2 for child in module.children()
    )


def _backbone(model: nn.Module) -> tuple[nn.Module, str]:
    """The network itself, and the prefix of its parameters' names."""
    inside = getattr(model, "backbone", None)
    return (inside, "backbone.") if isinstance(inside, nn.Module) else (model, "")


def _names_in(network: nn.Module, modules: Sequence[object]) -> set[str]:
    wanted = {id(module) for module in modules}
    return {
        f"{name}.{parameter}"
        for name, module in network.named_modules()
        if id(module) in wanted
        for parameter, _ in module.named_parameters()
    }


def _last_names(network: nn.Module) -> set[str]:
    """Parameters of the last module that has some of its own."""
    own = [
        {f"{name}.{parameter}".lstrip(".") for parameter, _ in found}
        for name, module in network.named_modules()
        if (found := list(module.named_parameters(recurse=False)))
    ]
    return own[-1]
