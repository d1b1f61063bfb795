"""Which tensor of a network each tensor of a file is: by its name, else by the structure of both.

By structure means: the file has the network's shapes in the network's order, under other names. The
order alone may mislead, so a match has to pass checks of what the names still tell (`_Structure`).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distcls.errors import UsageError
from distcls.models.classifier import Classifier, head_parameters
from distcls.models.pretrained import Weights

PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "pretrain_")
"""Prefixes that wrappers add to a tensor's name; they are removed wherever they come."""
AVERAGES = re.compile("ema|teacher|averag")
"""Of two submodules that fit alike, an average of the other goes first."""
DENSE = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""torchvision's DenseNet files are older than PyTorch's ban on dots within a name."""
MOST_NAMED = 20
"""Tensors that a report names of each table row; the rest are counted."""
MOST_PAIRS = 3
"""Tensors whose name on both sides is shown, of a match by structure or of none."""
LONGEST_RUN = 3
"""Children of a module that two of its branches may have, to be taken for one another."""
NUMBERED = re.compile(r"(.*?)(\d+)")
LETTERED = re.compile(r"(..+)([a-zA-Z])")

How = Literal["auto", "name", "structure"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of each tensor, as (name, number of values)."""

    source: str
    loaded: dict[str, int]
    skipped: dict[str, int]
    """In the file, not taken: `name (why)`."""
    missing: dict[str, int]
    """In the network, not in the file; these keep their initialisation."""
    notes: tuple[str, ...] = ()
    """How the names were matched, where that is more than the same names; other remarks."""

    def lines(self) -> list[str]:
        """Printable: a table, then a line for each tensor that was not simply loaded."""
        rows = {"loaded": self.loaded, "skipped": self.skipped, "missing": self.missing}
        table = [
            f"  {row:<8}{len(found):>5,} tensors {sum(found.values()):>13,} values"
            for row, found in rows.items()
        ]
        names = [*_listed("skipped", self.skipped), *_listed("missing", self.missing)]
        notes = [f"  {note}" for note in self.notes]
        return [f"pretrained: {self.source}", *notes, *table, *names]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """The network's tensors with the file's names for them."""

    names: dict[str, str]
    """The network's name: the file's."""
    skipped: dict[str, int]
    """As in `LoadReport`."""
    notes: tuple[str, ...] = ()


class NoMatch(Exception):
    """The structures differ; the text says where."""


def apply_weights(
    model: Classifier, weights: Weights, *, match: How = "auto", allow_partial: bool = False
) -> LoadReport:
    """Copy every tensor of the weights that is one of the backbone's, found as `match` has it.

    auto goes by the names, and by the structure where these fill less than half of the backbone's
    values (batch norm's statistics included). Raises UsageError if neither does, unless
    `allow_partial` and some names fit, or if there is doubt which tensor is which.
    """
    own = model.backbone.state_dict()
    found = _match(model, weights, own, match, allow_partial)
    with torch.no_grad():
        for name, theirs in found.names.items():
            own[name].copy_(weights.tensors[theirs].reshape(own[name].shape))
        heads = {name.removeprefix("backbone.") for name in head_parameters(model)}
        if heads.isdisjoint(found.names):
            # from equal logits: timm's initialisation of a head of few classes gives logits in
            # the tens over trained features (EfficientNet-Lite0, 1,300 icons of 8 classes, 5
            # epochs: loss of the first 3.9, where ln 8 is 2.1, and val top-1 0.694)
            for name in heads & own.keys():
                own[name].zero_()
    loaded = {name: own[name].numel() for name in found.names}
    met = loaded.keys() | {name.partition(" (")[0] for name in found.skipped}
    missing = {name: tensor.numel() for name, tensor in own.items() if name not in met}
    notes = (*weights.notes, *found.notes)
    return LoadReport(
        source=weights.source, loaded=loaded, skipped=found.skipped, missing=missing, notes=notes
    )


def _match(
    model: Classifier, weights: Weights, own: dict[str, Tensor], how: How, allow_partial: bool
) -> Match:
    named = by_name(weights.tensors, own)
    total, found = sum(map(Tensor.numel, own.values())), sum(own[n].numel() for n in named.names)
    if how != "structure" and named.names and found * 2 >= total:
        return named
    reason = ""
    if how != "name":
        try:
            return by_structure(model, weights)
        except NoMatch as error:
            reason = f"; by structure: {error}"
    if how == "structure":
        fills = f" does not have the network's structure: {reason.partition(': ')[2]}"
    elif named.names and allow_partial:
        return named
    else:
        tensors = f"{len(named.names)} of its {len(own)} tensors"
        fills = f" fills {found:,} of the network's {total:,} values by name ({tensors}){reason}"
    taken = set() if how == "structure" else {*named.names, *named.names.values()}
    theirs, ours = (
        [name for name in names if name not in taken] for names in (weights.tensors, own)
    )
    partial = named.names and how != "structure"
    remedies = ["model.allow_partial takes those of the same name"] if partial else []
    raise UsageError(
        f"model.pretrained: {weights.source}{fills}; names without a counterpart in the file: "
        f"{_first(theirs)}; in the network: {'; '.join([_first(ours), *weights.notes, *remedies])}"
    )


def by_name(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Match:
    """The tensors of the same name and shape, without the prefix that lets most values fit."""
    prefix = _best_prefix(tensors, own)
    names: dict[str, str] = {}
    skipped: dict[str, int] = {}
    met: set[str] = set()
    for name, tensor in tensors.items():
        target = _own_name(name.removeprefix(prefix), own) if name.startswith(prefix) else None
        if not name.startswith(prefix):
            reason = f"outside {prefix[:-1]}"
        elif target is None:
            reason = "not in the network"
        elif target in met:
            reason = "in the file twice"
        elif own[target].shape != tensor.shape:
            reason = f"{list(tensor.shape)} in the file, {list(own[target].shape)} in the network"
        else:
            reason, names[target] = "", name
        if target is not None:
            met.add(target)
        if reason:
            skipped[f"{name if target is None else target} ({reason})"] = tensor.numel()
    notes = (f"by name, without the prefix {prefix!r}",) if prefix else ()
    return Match(names=names, skipped=skipped, notes=notes)


def _best_prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Of all that stands before a dot, what to remove; the shortest, and first, of equals."""
    fitting: dict[str, dict[str, int]] = {"": {}}
    for name, tensor in tensors.items():
        ends = [0, *(match.end() for match in re.finditer(r"\.", name))]
        for end in ends:
            target = _own_name(name[end:], own)
            if target is not None and own[target].shape == tensor.shape:
                fitting.setdefault(name[:end], {})[target] = tensor.numel()

    def rank(prefix: str) -> tuple[int, bool]:
        return sum(fitting[prefix].values()), AVERAGES.search(prefix.lower()) is not None

    return max(fitting, key=rank)


def _own_name(name: str, own: Mapping[str, Tensor]) -> str | None:
    """The network's tensor that a file's name means, without what wrappers put before it."""
    name = DENSE.sub(r"\1\2", name)
    while name not in own:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return name


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A tensor of the network, and that of the file which stands at its place."""

    own: str
    theirs: str
    own_shape: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def modules(self) -> tuple[str, str]:
        """The modules that hold the two."""
        return self.own.rpartition(".")[0], self.theirs.rpartition(".")[0]

    def __str__(self) -> str:
        return f"{self.theirs} {list(self.shape)} for {self.own} {list(self.own_shape)}"


def by_structure(model: Classifier, weights: Weights) -> Match:
    """The file's tensors at the places of the network's, whatever their names. Raises NoMatch.

    The head may be of another number of classes, or absent; it is then left out.
    """
    pairs = _aligned(model, weights)
    head = {name.removeprefix("backbone.") for name in head_parameters(model)}
    left_out = [each for each in pairs if not _fits(each.own_shape, each.shape)]
    for pair in pairs:
        same_kind = pair.own.rpartition(".")[2] == pair.theirs.rpartition(".")[2]
        other_classes = pair.own in head and pair.own_shape[1:] == pair.shape[1:]
        if not same_kind or (pair in left_out and not other_classes):
            raise NoMatch(f"it has {pair}")
    _require_whole_modules(pairs)
    _require_statistics(pairs, weights.tensors)
    _require_order([pair.theirs for pair in pairs])
    _require_nested(pairs)
    _require_unambiguous(model.backbone, pairs)
    names = {pair.own: pair.theirs for pair in pairs if pair not in left_out}
    partners = dict(pair.modules for pair in pairs)
    for name, tensor in model.backbone.state_dict().items():  # counters and tables of indices
        module, _, kind = name.rpartition(".")
        other = f"{partners.get(module)}.{kind}"
        found = weights.tensors.get(other)
        if not tensor.is_floating_point() and found is not None and found.shape == tensor.shape:
            names[name] = other
    skipped = {
        f"{pair.own} ({list(pair.shape)} in the file, {list(pair.own_shape)} in the network)": (
            weights.tensors[pair.theirs].numel()
        )
        for pair in left_out
    }
    taken = {*names.values(), *(pair.theirs for pair in left_out)}
    rest = {n: t.numel() for n, t in weights.tensors.items() if n not in taken}
    skipped |= {f"{name} (not in the network)": count for name, count in rest.items()}
    examples = [f"{pair.theirs} is {pair.own}" for pair in pairs[:MOST_PAIRS]]
    note = "matched by structure, as the names differ: the same shapes in the same order"
    return Match(names=names, skipped=skipped, notes=(note, *examples))


def _aligned(model: Classifier, weights: Weights) -> list[_Pair]:
    """The tensors of both in their order, without counters; NoMatch where the numbers differ."""
    if not weights.ordered:
        raise NoMatch("a safetensors file does not keep the order of the tensors; give a .pth file")
    theirs = {n: t for n, t in weights.tensors.items() if t.is_floating_point()}
    own = {n: t for n, t in model.backbone.state_dict().items() if t.is_floating_point()}
    if len(theirs) < len(own):
        head = {name.removeprefix("backbone.") for name in head_parameters(model)}
        without = {name: tensor for name, tensor in own.items() if name not in head}
        own = without if len(theirs) == len(without) else own
    if len(theirs) != len(own):
        raise NoMatch(f"it has {len(theirs)} weights and statistics, the network {len(own)}")
    return [
        _Pair(name, other, tuple(own[name].shape), tuple(theirs[other].shape))
        for name, other in zip(own, theirs, strict=True)
    ]


def _fits(own: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Whether the shapes are the same, a 1x1 convolution being a linear layer."""
    longer, shorter = sorted((own, theirs), key=len, reverse=True)
    return longer == shorter or (len(shorter) == 2 and longer == (*shorter, 1, 1))


def _require_whole_modules(pairs: Sequence[_Pair]) -> None:
    """All tensors of a module of the file go to one module of the network, and the reverse."""
    for side in (0, 1):
        partner: dict[str, str] = {}
        for pair in pairs:
            first = partner.setdefault(pair.modules[side], pair.modules[1 - side])
            if first != pair.modules[1 - side]:
                raise NoMatch(f"it has {pair}, away from the other tensors of their module")


def _require_statistics(pairs: Sequence[_Pair], tensors: Mapping[str, Tensor]) -> None:
    """What is taken for a running variance is one."""
    for pair in pairs:
        if pair.own.endswith("running_var"):
            variance = tensors[pair.theirs]
            if not (torch.isfinite(variance).all() and (variance >= 0).all() and variance.any()):
                raise NoMatch(f"{pair.theirs} holds no variances")


def _require_order(names: Sequence[str]) -> None:
    """Modules stand together, and numbered ones ascend: the file is in the network's own order."""
    last: dict[str, int] = {}
    numbers: dict[tuple[str, str], int] = {}
    for at, name in enumerate(names):
        for module, child in _steps(name):
            new = module + child not in last
            if not new and last[module + child] != at - 1:
                raise NoMatch(f"the tensors of {module + child} are not contiguous")
            last[module + child] = at
            match = NUMBERED.fullmatch(child)
            if new and match is not None:
                stem = (module, match[1])
                if numbers.get(stem, -1) >= int(match[2]):
                    before = f"{module}{match[1]}{numbers[stem]}"
                    raise NoMatch(f"{module}{child} comes after {before}, out of order")
                numbers[stem] = int(match[2])


def _steps(name: str) -> Iterator[tuple[str, str]]:
    """The path to a tensor's module: each module (with a dot behind it) and its child."""
    parts = name.split(".")[:-1]
    for end, part in enumerate(parts):
        yield "".join(f"{each}." for each in parts[:end]), part


def _require_nested(pairs: Sequence[_Pair]) -> None:
    """A module of one side lies inside one of the other, around it, or beside it.

    Not so for the outermost, into which authors divide the same layers differently.
    """
    own = _spans([pair.own for pair in pairs])
    for start, end in _spans([pair.theirs for pair in pairs]):
        for first, last in own:
            if start < first < end < last or first < start < last < end:
                raise NoMatch(f"modules begin and end elsewhere, at {pairs[max(start, first)]}")


def _spans(names: Sequence[str]) -> set[tuple[int, int]]:
    """First index and end of each module, the outermost ones left out."""
    shared = 0
    while len({name.split(".")[shared] for name in names}) == 1:
        shared += 1
    spans: dict[str, tuple[int, int]] = {}
    for at, name in enumerate(names):
        for depth, (module, child) in enumerate(_steps(name)):
            if depth > shared:
                start, _ = spans.get(module + child, (at, at))
                spans[module + child] = start, at + 1
    return set(spans.values())


@dataclasses.dataclass(frozen=True)
class _Child:
    """A child of one of the network's modules."""

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """Of its tensors: the last part of the name, and the shape."""
    words: frozenset[str]
    """Parts that the names of its tensors in the file have in common."""


def _require_unambiguous(network: nn.Module, pairs: Sequence[_Pair]) -> None:
    """No two neighbouring branches of a module could as well be each other, as the query and key
    layers of an attention block might, written down in the other order by another author.

    They are told apart where another module of the same class has them in different shapes, or by
    the file's names for them. Layers in a sequence are in the order in which they run.
    """
    runs: dict[tuple[type, tuple[str, ...], tuple[str, ...]], list[tuple[list[_Child], ...]]] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        children = list(_children(path, module, pairs))
        for first, second in _neighbours(children):
            key = type(module), _names(first), _names(second)
            runs.setdefault(key, []).append((first, second))
    for (_, *names), places in runs.items():
        if any(_shapes(first) != _shapes(second) for first, second in places):
            continue
        if _numbered(*names):
            continue
        for first, second in places:
            if not _told_apart(first, second):
                raise NoMatch(
                    f"ambiguous, {' and '.join(names[0])} of the network have the same shapes as "
                    f"{' and '.join(names[1])}, and the file's names do not tell which is which"
                )


def _children(path: str, module: nn.Module, pairs: Sequence[_Pair]) -> Iterator[_Child]:
    before = f"{path}." if path else ""
    for name, _ in module.named_children():
        inside = [pair for pair in pairs if pair.own.startswith(f"{before}{name}.")]
        if inside:
            words = [{_plain(part) for part in pair.theirs.split(".")[:-1]} for pair in inside]
            shapes = tuple((pair.own.rpartition(".")[2], pair.own_shape) for pair in inside)
            yield _Child(name, shapes, frozenset(set.intersection(*words)))


def _neighbours(children: list[_Child]) -> Iterator[tuple[list[_Child], list[_Child]]]:
    lengths = range(1, LONGEST_RUN + 1)
    for start, one, other in itertools.product(range(len(children)), lengths, lengths):
        if start + one + other <= len(children):
            middle = start + one
            yield children[start:middle], children[middle : middle + other]


def _shapes(run: list[_Child]) -> list[tuple[str, tuple[int, ...]]]:
    return [shape for child in run for shape in child.shapes]


def _names(run: list[_Child]) -> tuple[str, ...]:
    return tuple(child.name for child in run)


def _numbered(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    """Whether they are conv1 and conv2, or conv1, norm1 and conv2, norm2: in order."""
    return len(first) == len(second) and all(map(_ascend, first, second))


def _ascend(one: str, other: str) -> bool:
    """Whether they are conv1 and conv2, or mixed_c and mixed_d."""
    numbers = NUMBERED.fullmatch(one), NUMBERED.fullmatch(other)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0][1] == numbers[1][1]
    letters = LETTERED.fullmatch(one), LETTERED.fullmatch(other)
    if letters[0] is None or letters[1] is None or letters[0][1] != letters[1][1]:
        return False
    return ord(letters[1][2]) - ord(letters[0][2]) == 1


def _told_apart(first: list[_Child], second: list[_Child]) -> bool:
    """Whether a name of the network stands in the file at its place, and none at the other's."""
    told = False
    for run, other in ((first, second), (second, first)):
        elsewhere = frozenset[str]().union(*(child.words for child in other))
        for child in run:
            name = _plain(child.name)
            if name in elsewhere and name not in child.words:
                return False
            told = told or (name in child.words and name not in elsewhere)
    return told


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _first(names: Sequence[str]) -> str:
    shown = [textwrap.shorten(name, 60) for name in names[:MOST_PAIRS]]
    more = ", ..." if len(names) > MOST_PAIRS else ""
    return (", ".join(shown) + more) or "none"


def _listed(row: str, tensors: dict[str, int]) -> list[str]:
    rows = [f"  {row} {name}" for name in list(tensors)[:MOST_NAMED]]
    more = len(tensors) - MOST_NAMED
    return [*rows, f"  ... and {more} more {row}"] if more > 0 else rows
