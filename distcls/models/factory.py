"""Building a network by name, for any number of classes and any size of input."""

from __future__ import annotations

import inspect
import typing
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from distcls.errors import UsageError
from distcls.imaging import Preprocess
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.registry import NETWORKS, Origin, own_module, resolve
from distcls.registry import kind_of, parameters_of, require_takes


class Built(NamedTuple):
    """A network before any weights are loaded."""

    network: nn.Module
    """float [N, 3, H, W] to logits [N, classes]."""
    dropped: bool
    """Whether the constructor took the dropout; if not, there is none before the last layer."""


def construct(
    origin: Origin, classes: int, size: tuple[int, int], dropout: float | None = None
) -> Built:
    """Build a network for inputs of `size` (height, width), with its library's initialisation.

    `dropout` goes before the last layer where the constructor takes it; None is its default.
    Raises UsageError if the network cannot be built for that size.
    """
    make = {"distcls": _ours, "torchvision": _from_torchvision, "timm": _from_timm}[origin.library]
    try:
        return make(origin.name, classes, size, dropout)
    except (AssertionError, ValueError) as error:
        height, width = size
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"model.name: {origin.name} cannot be built for {height}x{width} pixels: {reason}; "
            "choose another input.size or model"
        ) from error


def torchvision_parameters(name: str) -> set[str]:
    """Names of the parameters of a torchvision model's class."""
    from torchvision.models import get_model_builder

    network = typing.get_type_hints(get_model_builder(name))["return"]
    return set(inspect.signature(network).parameters)


def takes_dropout(name: str) -> bool:
    """Whether one of torchvision's constructors takes the dropout before the last layer."""
    known = torchvision_parameters(name)
    # where attention has a dropout of its own, `dropout` is that of every block
    return "dropout" in known and "attention_dropout" not in known


def _ours(name: str, classes: int, size: tuple[int, int], dropout: float | None) -> Built:
    make = NETWORKS.find(name).value
    if not callable(make) or isinstance(make, nn.Module):
        raise UsageError(
            f"model.name: {name} is {kind_of(make)}; expected a class, or a function that makes "
            "the network from the number of classes: export and resumed runs make it anew"
        )
    options: dict[str, Any] = {"size": size, "dropout": dropout}
    parameters = parameters_of(make)
    anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    names = {each.name for each in parameters}
    taken = {
        key: value
        for key, value in options.items()
        if value is not None and (key in names or anything)
    }
    arguments = ", ".join(["the number of classes", *taken])
    require_takes("model.name", name, make, arguments, classes, **taken)
    network = make(classes, **taken)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model.name: {name} returned a value {kind_of(network)}, expected an nn.Module"
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        some = any(True for _ in network.parameters())
        what = "only parameters that need no gradient" if some else "no parameters"
        raise UsageError(f"model.name: {name} has {what}, so there is nothing to train")
    return Built(network, "dropout" in names or anything)


def _from_torchvision(
    name: str, classes: int, size: tuple[int, int], dropout: float | None
) -> Built:
    from torchvision.models import get_model

    known = torchvision_parameters(name)
    options: dict[str, Any] = {"num_classes": classes}
    if "aux_logits" in known:
        options["aux_logits"] = (
            False  # heads of GoogLeNet and Inception that train deep layers only
        )
    if "init_weights" in known:
        options["init_weights"] = True  # the default is the same with a warning
    if "image_size" in known:
        if size[0] != size[1]:
            raise ValueError("it takes square images only")
        options["image_size"] = size[0]
    if "input_size" in known:
        options["input_size"] = size
    takes = takes_dropout(name)
    if takes and dropout is not None:
        options["dropout"] = dropout
    return Built(get_model(name, weights=None, **options), takes)


def _from_timm(name: str, classes: int, size: tuple[int, int], dropout: float | None) -> Built:
    import timm

    options: dict[str, Any] = {"num_classes": classes}
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        options["img_size"] = size
    if dropout is None:
        return Built(timm.create_model(name, **options), False)
    try:
        return Built(timm.create_model(name, drop_rate=dropout, **options), True)
    except TypeError as error:  # timm's entry points take anything, their classes do not
        if "'drop_rate'" not in str(error):
            raise
        return Built(timm.create_model(name, **options), False)


def initialise(network: nn.Module, how: Literal["library", "xavier", "he"]) -> None:
    """Draw the weights of convolutions and linear layers anew, their biases being 0.

    xavier: uniform, of variance 2 / (fan in + fan out) (Glorot, Bengio: Understanding the
    difficulty of training deep feedforward neural networks, 2010). he: normal, of variance
    2 / fan in (He et al.: Delving Deep into Rectifiers, 2015). library leaves all as it is.
    """
    if how == "library":
        return
    for module in network.modules():
        if not isinstance(module, nn.Linear | _ConvNd):
            continue
        if how == "xavier":
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def set_batch_norm_momentum(network: nn.Module, momentum: float) -> None:
    """Set the momentum of all batch norms' running statistics."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum


class DroppedLinear(nn.Linear):
    """A linear layer, [N, features] to [N, classes], that drops features before it in training.

    Its parameters have nn.Linear's names, so weights of either fit the other.
    """

    dropout: float

    @classmethod
    def of(cls, layer: nn.Linear, dropout: float) -> DroppedLinear:
        """The same layer with dropout; it holds the very tensors of `layer`."""
        # on no device: nothing is allocated, nothing drawn, and the tensors are replaced at once
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new._parameters.update(layer._parameters)
        new.dropout = dropout
        return new.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Drop, then multiply."""
        return super().forward(F.dropout(input, self.dropout, self.training))


def drop_before_last(network: nn.Module, classes: int, dropout: float) -> None:
    """Drop features before the last layer. Raises UsageError if that is not a linear one."""
    last = None
    for parent in network.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.out_features == classes:
                last = parent, name, child
    if last is None:
        raise UsageError(
            f"model.dropout: {dropout} given, but this network has no linear last layer to drop "
            "features before; leave it null"
        )
    parent, name, child = last
    setattr(parent, name, DroppedLinear.of(child, dropout))


def stem_stride(backbone: nn.Module) -> int | None:
    """Stride of the first convolution; None where there is none, or its height and width differ."""
    stem = _stem(backbone)
    return int(stem.stride[0]) if stem is not None and len(set(stem.stride)) == 1 else None


def set_stem_stride(backbone: nn.Module, stride: int) -> None:
    """Set the stem's stride; its weights fit any."""
    stem = _stem(backbone)
    assert stem is not None
    stem.stride = (stride, stride)


def require_stride(backbone: nn.Module, stride: int) -> None:
    """Raise UsageError where the network cannot do with this stride."""
    stem = _stem(backbone)
    if stem is None:
        raise UsageError(
            f"model.stem_stride: {stride} given, but this network has no convolution over the image"
        )
    own = int(stem.stride[0])
    if own not in (2, stride):
        raise UsageError(
            f"model.stem_stride: {stride} given, but the first convolution of this network has "
            f"stride {own} by design (it cuts the image into patches, or is made for small images);"
            " leave it at auto"
        )


def _stem(backbone: nn.Module) -> nn.Conv2d | None:
    convolutions = (module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    return next((layer for layer in convolutions if layer.in_channels == 3), None)


class ColumnMeans(nn.Module):
    """Mean over the height of a feature map: float [N, C, H, W] to [N, C, 1, W]."""

    def forward(self, features: Tensor) -> Tensor:
        """Take the mean."""
        return features.mean(2, keepdim=True)


def keep_columns(model: Classifier, size: tuple[int, int]) -> None:
    """Replace the mean over all positions by a mean of each column, for inputs of `size`.

    The first linear layer above it grows by as many times and is drawn anew (PyTorch's way). Raises
    UsageError where the network has no such layer, or its last feature map one column only.
    """
    holder, name = _place(model.backbone)
    pool: nn.Module = getattr(holder, name)
    columns = _columns(model, pool, size)
    if columns == 1:
        raise UsageError(
            f"model.pool: columns given, but of {size[0]}x{size[1]} pixels this network's last "
            "feature map is one column wide; choose a wider input.size or model.stem_stride 1"
        )
    layer = _linear_above(model.backbone, pool)
    setattr(holder, name, ColumnMeans())
    layer.in_features *= columns
    layer.weight = nn.Parameter(layer.weight.new_empty(layer.out_features, layer.in_features))
    layer.reset_parameters()


def _place(network: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the mean over all, and the name by which it does."""
    timm = getattr(network, "global_pool", None)
    for holder, name in ((network, "avgpool"), (timm, "pool")):
        pool = getattr(holder, name, None)
        plain = isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))
        if plain and isinstance(holder, nn.Module):
            return holder, name
    raise UsageError(
        "model.pool: columns given, but this network has no layer that takes the mean over all of "
        "the last feature map; mobilenet_v3_small, efficientnet_b0 and resnet18 have one"
    )


def _linear_above(network: nn.Module, pool: nn.Module) -> nn.Linear:
    """The first linear layer after `pool`, in the order in which the network holds its layers."""
    layers = iter(network.modules())
    for layer in layers:
        if layer is pool:
            break
    return next(layer for layer in layers if isinstance(layer, nn.Linear))


def _columns(model: Classifier, pool: nn.Module, size: tuple[int, int]) -> int:
    """Width of the feature map that reaches `pool`."""
    widths: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        widths.append(int(inputs[0].shape[3]))

    hook = pool.register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *size, 3, dtype=torch.uint8))
    hook.remove()
    model.train()
    return widths[0]


def build(config: ModelConfig, classes: int, preprocess: Preprocess) -> Classifier:
    """A network with its initialisation, in training mode.

    Raises UsageError for an unknown name, with the nearest known, for options that the network
    cannot follow, and for a size of input that it cannot take.
    """
    built = construct(resolve(config.name), classes, preprocess.size, config.dropout)
    if config.dropout is not None and not built.dropped:
        drop_before_last(built.network, classes, config.dropout)
    model = Classifier(built.network, preprocess)
    _fit_to_size(model, config, classes, preprocess.size)
    if config.pool == "columns":
        keep_columns(model, preprocess.size)
        if reason := _failure(model, classes, preprocess.size):
            raise UsageError(f"model.pool: {config.name} cannot keep its columns: {reason}")
    initialise(built.network, config.init)
    set_batch_norm_momentum(built.network, config.batch_norm_momentum)
    return model


OUTPUT = "its output for one image"


def require_known(name: str) -> None:
    """Raise UsageError unless `name` is a network that distcls can build."""
    resolve(name)


def _fit_to_size(
    model: Classifier, config: ModelConfig, classes: int, size: tuple[int, int]
) -> None:
    """Set the stem's stride and check that an image passes through the network."""
    wanted = config.wanted_stride(size)
    if config.stem_stride != "auto":
        require_stride(model.backbone, config.stem_stride)
        set_stem_stride(model.backbone, config.stem_stride)
    elif wanted == 1 and stem_stride(model.backbone) == 2 and own_module(config.name) is None:
        set_stem_stride(model.backbone, 1)
        if _failure(model, classes, size) is None:
            return
        set_stem_stride(model.backbone, 2)  # a hybrid, whose attention supports one resolution only
    if reason := _failure(model, classes, size):
        height, width = size
        if reason.startswith(OUTPUT):
            raise UsageError(f"model.name: {config.name}: {reason}")
        raise UsageError(
            f"model.name: {config.name} cannot take images of {height}x{width} pixels: {reason}; "
            "choose another input.size or model"
        )


def _failure(model: nn.Module, classes: int, size: tuple[int, int]) -> str | None:
    """Why an image of this size does not pass through the network; None if it does."""
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *size, 3, dtype=torch.uint8))
    except Exception as error:  # hundreds of third-party networks, and as many ways to fail
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    finally:
        model.train()
    if not isinstance(logits, Tensor):
        return f"{OUTPUT} is {kind_of(logits)}, expected a tensor, a logit for each class"
    if logits.shape != (1, classes):
        return (
            f"{OUTPUT} has the shape {list(logits.shape)}, expected "
            f"{[1, classes]}: a logit for each of the {classes} classes"
        )
    return None
