"""Weights under other names: matched by what they are, or refused; never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distcls.errors import UsageError
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.models.matching import LoadReport, apply_weights
from distcls.models.pretrained import Weights, find_weights
from tests.small_networks import PROCESS, load, network, plain

State = dict[str, Tensor]
INPUT = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(0)).byte()


def trained(name: str, classes: int = 5) -> Classifier:
    """A network that no two tensors of are alike, running statistics included."""
    model = network(classes, seed=1, name=name)
    with torch.no_grad():
        for key, tensor in model.backbone.state_dict().items():
            if key.endswith(("running_mean", "bias")) or tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    return model


def numbered(tensors: State) -> State:
    """The names that a converter gives: the modules, numbered."""
    modules = {name.rpartition(".")[0]: None for name in tensors}
    number = {module: at for at, module in enumerate(modules)}
    return {
        f"m{number[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
        for name, tensor in tensors.items()
    }


def efficientnet_pytorch(tensors: State) -> State:
    """torchvision's EfficientNet under the names of the package efficientnet-pytorch."""
    table = {"0.0": "_expand_conv", "0.1": "_bn0", "1.0": "_depthwise_conv", "1.1": "_bn1"}
    table |= {"2.fc1": "_se_reduce", "2.fc2": "_se_expand", "3.0": "_project_conv", "3.1": "_bn2"}
    first = {f"{int(key[0]) - 1}{key[1:]}": name for key, name in table.items() if key[0] != "0"}
    ends = {"0.0": "_conv_stem", "0.1": "_bn0", "8.0": "_conv_head", "8.1": "_bn1"}
    blocks: dict[str, int] = {}
    renamed = {}
    for name, tensor in tensors.items():
        kind = name.rpartition(".")[2]
        if match := re.fullmatch(r"features\.(\d+\.\d+)\.block\.(.+)\.\w+", name):
            number = blocks.setdefault(match[1], len(blocks))
            inside = (first if number == 0 else table)[match[2]]
            renamed[f"_blocks.{number}.{inside}.{kind}"] = tensor
        elif match := re.fullmatch(r"features\.(\d+\.\d+)\.\w+", name):
            renamed[f"{ends[match[1]]}.{kind}"] = tensor
        else:
            renamed[f"_fc.{kind}"] = tensor
    return renamed


def match(model: Classifier, tensors: State, how: str = "auto") -> LoadReport:
    weights = Weights(tensors=tensors, source="w.pth", preprocess=None, name="w.pth")
    return apply_weights(model, weights, match=how)  # type: ignore[arg-type]


def refused(model: Classifier, tensors: State, how: str = "structure") -> str:
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    with pytest.raises(UsageError) as caught:
        match(model, tensors, how)
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(model: Classifier, source: Classifier) -> None:
    with torch.no_grad():
        assert torch.equal(model.eval()(INPUT), source.eval()(INPUT))


FAMILIES = [
    *("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "resnet18", "resnet50"),
    *("regnet_y_400mf", "shufflenet_v2_x0_5", "densenet121", "mnasnet0_5", "convnext_tiny"),
    *("timm:mobilenetv3_small_050", "timm:resnet10t", "timm:regnety_002", "timm:convnext_atto"),
    *("timm:ghostnet_050", "timm:mixer_s32_224", "simple_cnn"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_numbered_by_a_script(name: str) -> None:
    """The same network under numbered names gives the same logits."""
    size = 224 if "mixer" in name else 32
    config = ModelConfig(name=name)
    process = type(PROCESS)(size=(size, size))
    torch.manual_seed(1)
    source = build(config, 5, process)
    with torch.no_grad():
        for tensor in source.backbone.state_dict().values():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    torch.manual_seed(0)
    model = build(config, 5, process)
    report = match(model, numbered(source.backbone.state_dict()))
    assert (report.skipped, report.missing) == ({}, {})
    own, theirs = model.backbone.state_dict(), source.backbone.state_dict()
    assert all(torch.equal(own[key], theirs[key]) for key in own)


@pytest.mark.parametrize("name", ["efficientnet_b0", "timm:efficientnet_b0"])
def test_names_of_efficientnet_pytorch(name: str, tmp_path: Path) -> None:
    source = trained("efficientnet_b0", classes=7)
    torch.save(efficientnet_pytorch(source.backbone.state_dict()), tmp_path / "w.pth")
    model = network(name=name)
    report = load(tmp_path / "w.pth", model, name)
    lines = report.lines()
    assert lines[1] == (
        "  matched by structure, as the names differ: the same shapes in the same order"
    )
    stem = "features.0.0" if name == "efficientnet_b0" else "conv_stem"
    assert lines[2] == f"  _conv_stem.weight is {stem}.weight"
    assert [entry.rpartition(" (")[0] for entry in report.skipped] == [
        f"{'classifier.1' if ':' not in name else 'classifier'}.{kind} ([7{rest}"
        f" in the file, [5{rest} in the network)".partition(" (")[0]
        for kind, rest in (("weight", ", 1280]"), ("bias", "]"))
    ]
    assert report.missing == {}
    theirs = source.backbone.state_dict()
    values = list(theirs.values())[:-2]
    own = list(model.backbone.state_dict().values())[:-2]
    assert all(torch.equal(one, other) for one, other in zip(own, values, strict=True))


class Squeeze(nn.Module):
    """Squeeze and excitation as tutorials write it: with linear layers."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        layers = nn.Linear(channels, squeezed), nn.Linear(squeezed, channels)
        self.fc = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Hardsigmoid())

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.fc(x.mean((2, 3)))
        return x * scale[:, :, None, None]


class Bottleneck(nn.Module):
    def __init__(self, row: tuple[int, ...], se: bool, hard: bool) -> None:
        super().__init__()
        kernel, inside, hidden, out, stride = row
        act = nn.Hardswish if hard else nn.ReLU
        norm = lambda channels: nn.BatchNorm2d(channels, eps=1e-3)  # noqa: E731
        expand = [nn.Conv2d(inside, hidden, 1, bias=False), norm(hidden), act()]
        squeezed = max(8, int(hidden / 4 + 4) // 8 * 8)
        squeezed += 8 * (squeezed < 0.9 * hidden / 4)
        depth = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.residual = stride == 1 and inside == out
        self.layers = nn.Sequential(
            *(expand if hidden != inside else []),
            *(depth, norm(hidden), act(), Squeeze(hidden, squeezed) if se else nn.Identity()),
            *(nn.Conv2d(hidden, out, 1, bias=False), norm(out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class Tutorial(nn.Module):
    """MobileNetV3-Small by hand, under names of its own (Howard et al., 2019, table 2)."""

    ROWS = (
        *((3, 16, 16, 16, 2, 1, 0), (3, 16, 72, 24, 2, 0, 0), (3, 24, 88, 24, 1, 0, 0)),
        *((5, 24, 96, 40, 2, 1, 1), (5, 40, 240, 40, 1, 1, 1), (5, 40, 240, 40, 1, 1, 1)),
        *((5, 40, 120, 48, 1, 1, 1), (5, 48, 144, 48, 1, 1, 1), (5, 48, 288, 96, 2, 1, 1)),
        *((5, 96, 576, 96, 1, 1, 1), (5, 96, 576, 96, 1, 1, 1)),
    )

    def __init__(self, classes: int) -> None:
        super().__init__()
        norm = nn.BatchNorm2d(16, eps=1e-3), nn.BatchNorm2d(576, eps=1e-3)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), norm[0], nn.Hardswish())
        self.bneck = nn.ModuleList(Bottleneck(r[:5], bool(r[5]), bool(r[6])) for r in self.ROWS)
        self.top = nn.Sequential(nn.Conv2d(96, 576, 1, bias=False), norm[1], nn.Hardswish())
        self.hidden = nn.Linear(576, 1024)
        self.out = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.bneck:
            x = block(x)
        x = self.top(x).mean((2, 3))
        logits: Tensor = self.out(nn.functional.hardswish(self.hidden(x)))
        return logits


@pytest.mark.parametrize("counters", [True, False])
def test_a_tutorials_own_mobilenet_gives_the_same_logits(counters: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = Tutorial(5)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
    state = {
        name: value
        for name, value in theirs.state_dict().items()
        if counters or "num_batches_tracked" not in name
    }
    torch.save({"net": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "w")
    model = network()
    report = load(tmp_path / "w", model)
    assert all("num_batches_tracked" in name for name in report.missing)
    assert len(report.missing) == (0 if counters else 34)
    pixels = (INPUT.permute(0, 3, 1, 2).float() - model.mean) * model.inverse_std
    with torch.no_grad():
        expected = theirs.eval()(pixels)
        torch.testing.assert_close(model.eval()(INPUT), expected, atol=1e-3, rtol=1e-3)
    assert float(expected.std()) > 0.1


def transposed(tensors: State) -> State:
    """As TensorFlow has them: the input's channels first."""
    return {
        name: value.transpose(0, 1).contiguous() if value.ndim > 1 else value
        for name, value in tensors.items()
    }


def shuffled(tensors: State) -> State:
    names = list(tensors)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    return {names[at]: tensors[names[at]] for at in order}


def exchanged(tensors: State) -> State:
    """Two blocks of the same shapes in the other order, each under its own name."""
    names = list(tensors)
    one, other = ([n for n in names if n.startswith(part)] for part in ("layer1.0.", "layer1.1."))
    at = names.index(one[0])
    rest = [n for n in names if n not in {*one, *other}]
    return {name: tensors[name] for name in [*rest[:at], *other, *one, *rest[at:]]}


def scattered(tensors: State) -> State:
    """Two weights of the same shape at each other's place."""
    names = list(tensors)
    one, other = names.index("layer1.0.conv1.weight"), names.index("layer1.1.conv1.weight")
    names[one], names[other] = names[other], names[one]
    return {name: tensors[name] for name in names}


def negative(tensors: State) -> State:
    return {n: -v - 1 if n.endswith("running_var") else v for n, v in tensors.items()}


def other_kinds(tensors: State) -> State:
    """running_mean and running_var have the same shape."""
    swap = {"running_mean": "running_var", "running_var": "running_mean"}
    return {
        f"{name.rpartition('.')[0]}.{swap.get(name.rpartition('.')[2], name.rpartition('.')[2])}": v
        for name, v in tensors.items()
    }


CHANGES: dict[str, tuple[Callable[[State], State], str]] = {
    "transposed": (transposed, r"it has .*conv1\.weight \[3, 64, 7, 7\] for conv1\.weight \[64, 3"),
    "shuffled": (shuffled, "it has "),
    "sorted": (lambda tensors: dict(sorted(tensors.items())), "it has "),
    "exchanged": (exchanged, r"layer1\.0 comes after layer1\.1, out of order"),
    "scattered": (scattered, r"layer1\.0 comes after layer1\.1"),
    "negative": (negative, "holds no variances"),
    "other kinds": (other_kinds, "it has .*running_var .* for bn1.running_mean"),
    "one more": (lambda t: {**t, "x.weight": torch.zeros(2)}, "it has 103 weights"),
    "half": (lambda t: dict(list(t.items())[:60]), r"it has \d+ weights and statistics"),
    "names without parts": (
        lambda t: {f"p{at}": value for at, value in enumerate(t.values())},
        "it has p0 ",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_match_is_refused(change: str) -> None:
    make, reason = CHANGES[change]
    text = refused(network(name="resnet18"), make(trained("resnet18").backbone.state_dict()))
    assert re.search(f"w.pth does not have the network's structure: .*({reason})", text), text


def test_numbers_out_of_order_are_refused() -> None:
    """Sorted as text: m10 comes before m2, and their shapes may be the same."""
    tensors = numbered(trained("resnet18").backbone.state_dict())
    swapped = {"m4": "m6", "m6": "m4"}  # two convolutions of 64 channels
    renamed = {
        f"{swapped.get(name.split('.')[0], name.split('.')[0])}.{name.split('.')[1]}": value
        for name, value in tensors.items()
    }
    assert renamed["m4.weight"].shape == tensors["m4.weight"].shape
    assert "out of order" in refused(network(name="resnet18"), renamed)


class Attention(nn.Module):
    def __init__(self, classes: int, size: tuple[int, int], dropout: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        logits: Tensor = self.head(y.mean(1))
        return logits


def attention(names: tuple[str, str, str]) -> State:
    state = Attention(5, (32, 32)).state_dict()
    return {
        ".".join(dict(zip("qkv", names, strict=True)).get(part, part) for part in name.split("."))
        .replace("patch", "embed")
        .replace("head", "out"): value
        for name, value in state.items()
    }


def attending() -> Classifier:
    return Classifier(Attention(5, (32, 32)), PROCESS)


def test_branches_that_could_be_each_other_are_refused() -> None:
    """Query, key and value layers have the same shapes, in whatever order an author writes them."""
    for names in [("a", "b", "c"), ("m1", "m2", "m3"), ("to_x", "to_y", "to_z")]:
        text = refused(attending(), attention(names))
        assert "ambiguous, q of the network have the same shapes as k, and the file's" in text
    assert "ambiguous" in refused(attending(), attention(("k", "q", "v")))
    model = attending()
    report = match(model, attention(("q", "k", "v")), "structure")
    assert report.missing == {}


def test_safetensors_keep_no_order(tmp_path: Path) -> None:
    save_file(numbered(plain()), tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=r"a safetensors file does not keep the order"):
        load(tmp_path / "w.safetensors", network())


def test_each_way_alone(tmp_path: Path) -> None:
    tensors = numbered(plain())
    text = refused(network(), tensors, "name")
    assert "fills 0 of the network's" in text
    assert "structure" not in text
    assert "in the file: m0.weight, m1.weight, m1.bias, ...; in the network: features.0.0." in text
    report = match(network(), plain(), "structure")
    assert report.notes[0].startswith("matched by structure")
    torch.save(tensors, tmp_path / "w.pth")
    assert find_weights(ModelConfig(pretrained=str(tmp_path / "w.pth"))) is not None


def test_a_backbone_without_its_head() -> None:
    source = trained("resnet18")
    tensors = {
        n: v for n, v in numbered(source.backbone.state_dict()).items() if v.shape[:1] != (5,)
    }
    report = match(network(name="resnet18"), tensors)
    assert list(report.missing) == ["fc.weight", "fc.bias"]
    assert report.skipped == {}


@pytest.mark.parametrize(
    "prefix", ["encoder.", "net.", "student.backbone.", "model.encoder_q.", "a.b.c.", "0."]
)
def test_any_common_prefix_is_removed(prefix: str) -> None:
    model, source = network(), trained("mobilenet_v3_small")
    state = source.backbone.state_dict()
    tensors = {f"{prefix}{name}": value for name, value in state.items()}
    tensors |= {"projector.0.weight": torch.zeros(4, 4), "queue": torch.zeros(3)}
    report = match(model, tensors)
    assert_same(model, source)
    assert list(report.skipped.values()) == [16, 3]
    assert report.missing == {}
    assert "without the prefix" in report.lines()[1]


def test_of_two_submodules_the_average_is_taken() -> None:
    source = trained("mobilenet_v3_small")
    state = source.backbone.state_dict()
    tensors = {f"student.{name}": torch.zeros_like(value) for name, value in state.items()}
    tensors |= {f"teacher.{name}": value for name, value in state.items()}
    model = network()
    report = match(model, tensors)
    assert_same(model, source)
    assert len(report.skipped) == len(state)
    assert all(name.endswith("(outside teacher)") for name in report.skipped)
