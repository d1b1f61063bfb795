"""Which folders of a tree are splits, which are classes.

Decided by the folders' names (`train`, `seg_train`, `valid_images`, `test1`) and by what lies in
them: a split's folder is made of class folders, a class' folder holds images. `flowers_train` is a
split beside `flowers_test`, but `bullet_train` beside `bus` is a class. Where both readings are
possible none is taken, and `splits` has to say.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from distcls import log
from distcls.data.source import SPLIT_NAMES, LabelOptions
from distcls.errors import BadValue, UsageError, did_you_mean

Subfolders = Callable[[Path], list[str]]
"""The names of the folders in a folder, without hidden ones."""

LOOSE = "in no class folder"
"""Reason of an image that lies beside the class folders."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which folders hold the class folders."""

    base: str
    """The folder that is looked at, relative; folders above it hold nothing else."""
    tops: dict[str, str | None]
    """Relative path of each folder of class folders, and its split; None without splits."""

    def place(self, path: str) -> tuple[str | None, str]:
        """The folder of `tops` that an image lies in, None for none; and its class or nothing."""
        for top in self.tops:
            if not top or path.startswith(top + "/"):
                name, slash, _ = path[len(top) + bool(top) :].partition("/")
                return top, name if slash else ""
        return None, ""

    def reason(self, path: str, top: str | None) -> str:
        """Why an image has no label."""
        name, slash, _ = path[len(self.base) + bool(self.base) :].partition("/")
        folder = _join(self.base, name)
        if top is not None or not slash or any(t.startswith(folder + "/") for t in self.tops):
            return LOOSE
        return f"in {folder}, which is no split"

    def say(self, root: Path) -> None:
        """Print what was taken for what, unless the folders right below `root` are classes."""
        splits = [f"{split} is {top}" for top, split in self.tops.items() if split is not None]
        if splits:
            log.say(f"{root}: splits by folder: {', '.join(splits)}")
        elif self.base:
            log.say(f"{root}: the folders in {self.base} are the classes")


def find_layout(
    root: Path, files: Sequence[str], options: LabelOptions, subfolders: Subfolders
) -> Layout:
    """Where the class folders lie among `files`, relative to `root`; says what was taken for what.

    `options` may name the splits; a folder with the name of one of its classes is never looked
    through. Raises UsageError where two readings are possible.
    """
    layout = _Reader(root, files, options.classes or (), subfolders).read(options.splits)
    layout.say(root)
    return layout


_SPLIT_WORDS = SPLIT_NAMES | {"heldout": "test", "tst": "test", "trn": "train"}
_SPLIT_WORDS |= {f"{word}set": split for word, split in _SPLIT_WORDS.items()}
_UNLABELLED = {
    *("unlabeled", "unlabelled", "unsup", "unsupervised", "pred", "predict", "prediction"),
    *("predictions", "inference", "submission"),
}
_FILLERS = {
    *("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos"),
    *("data", "dataset", "set", "seg", "split", "folder", "files", "jpg", "jpeg", "png", "raw"),
}
"""Words that say nothing about which split a folder is."""
_ANNOTATIONS = {"annotation", "annotations", "label", "labels", "meta", "metadata"}


@dataclasses.dataclass(frozen=True)
class _Name:
    """What a folder's name says: `flowers_train2` is train, with the rest `flowers`."""

    split: str | None
    unlabelled: bool
    rest: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> _Name:
        """Read a name: words end at other characters, at numbers and before capitals."""
        spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
        words = re.findall(r"[^\W\d_]+", spaced.lower())
        for first, second in (("hold", "out"), ("held", "out")):
            if words[-2:] == [first, second]:
                words[-2:] = [first + second]
        splits = [word for word in words if word in _SPLIT_WORDS]
        said = _FILLERS | _SPLIT_WORDS.keys() | _UNLABELLED
        unlabelled = any(word in _UNLABELLED for word in words)
        one = len(splits) == 1 and not unlabelled
        return cls(
            split=_SPLIT_WORDS[splits[0]] if one else None,
            unlabelled=unlabelled,
            rest=tuple(word for word in words if word not in said),
        )


@dataclasses.dataclass(kw_only=True)
class _Content:
    """How many images lie right in a folder, and how many in folders below it."""

    direct: int = 0
    below: Counter[str] = dataclasses.field(default_factory=Counter)
    """By the folder that they lie in."""

    @property
    def nested(self) -> bool:
        """Whether it is made of folders, with at most a few images beside them."""
        return self.below.total() > self.direct


class _Reader:
    """Finds the folders of splits and classes among those below `root`."""

    def __init__(
        self, root: Path, files: Sequence[str], classes: Sequence[str], subfolders: Subfolders
    ) -> None:
        self._root, self._files, self._classes = root, files, classes
        self._subfolders = subfolders

    def read(self, splits: Sequence[str]) -> Layout:
        """The layout, or that of `splits` as in `LabelOptions`."""
        base = self._unwrapped()
        classes = Layout(base=base, tops={base: None})
        if splits == ("none",):
            return classes
        if splits:
            return Layout(base="", tops={**self._named(splits)})
        return self._by_names(base) or classes

    def _named(self, splits: Sequence[str]) -> dict[str, str]:
        """The folders that `--splits` names."""
        tops: dict[str, str] = {}
        for text in splits:
            split, equals, folder = (part.strip() for part in text.partition("="))
            top = os.path.normpath(folder) if folder else ""
            if not equals or split.lower() not in SPLIT_NAMES or not top:
                expected = "none, or folders as in train=seg_train,test=seg_test"
                raise BadValue("splits", text, expected)
            if not self._content(top):
                hint = did_you_mean(top, self._subfolders(self._root))
                raise UsageError(f"splits: {self._root} has no folder {top!r} with images{hint}")
            inside = [known for known in tops if f"{top}/".startswith(f"{known}/")]
            inside += [known for known in tops if f"{known}/".startswith(f"{top}/")]
            if inside:
                raise UsageError(f"splits: {top!r} and {inside[0]!r} are inside each other")
            tops[top] = SPLIT_NAMES[split.lower()]
        return tops

    def _unwrapped(self) -> str:
        """The folder inside folders that hold nothing but it, as archives have them around all."""
        base = ""
        while True:
            held = self._content(base)
            folders = [
                name
                for name in self._subfolders(self._root / base)
                if name in held or name.lower() not in _ANNOTATIONS
            ]
            if len(folders) != 1 or set(held) != set(folders) or folders[0] in self._classes:
                return base
            name = _Name.of(folders[0])
            is_split = (name.split is not None or name.unlabelled) and not name.rest
            if is_split or not held[folders[0]].nested:
                return base
            base = _join(base, folders[0])

    def _by_names(self, base: str) -> Layout | None:
        """The folders of splits; None if all folders are classes."""
        held = self._content(base)
        names = {name: _Name.of(name) for name in self._subfolders(self._root / base)}
        splits = _certain(names)
        nested = {name for name in names if name in held and held[name].nested}
        others = [
            name
            for name in names
            if name in held and name not in splits and not names[name].unlabelled
        ]
        doubtful = [name for name in others if name in nested and names[name].split]
        found = {splits.get(name) or names[name].split for name in nested} - {None}
        if "train" in found and len(found) > 1 and doubtful:
            raise self._unclear(base, splits, doubtful)
        if not any(split == "train" and name in nested for name, split in splits.items()):
            # images right in `train` beside `car` and `bus`, or `test 1` beside `test 2`: classes
            alone = not others and (len(splits) == 1 or len(set(splits.values())) > 1)
            return self._layout(base, splits, nested) if alone else None
        if others and len(set(splits.values())) == 1:
            raise self._unclear(base, splits, others)
        return self._layout(base, splits, nested)

    def _layout(self, base: str, splits: dict[str, str], nested: set[str]) -> Layout:
        counts = Counter(split for name, split in splits.items() if name in nested)
        for split, count in counts.items():
            if count > 1:
                same = [name for name in splits if splits[name] == split and name in nested]
                raise self._unclear(base, splits, same)
        tops = {self._inner(_join(base, name)): split for name, split in splits.items()}
        return Layout(base=base, tops={**tops})

    def _inner(self, top: str) -> str:
        """The folder of the same name, or `images`, that is all there is in a split's folder."""
        held = self._content(top)
        if len(held) != 1 or "" in held:
            return top
        [inner] = held
        name = _Name.of(inner)
        same = name == _Name.of(top.rpartition("/")[2])
        fillers = not name.rest and name.split is None and held[inner].nested
        if inner in self._classes or not (same or fillers):
            return top
        return _join(top, inner)

    def _unclear(self, base: str, splits: dict[str, str], names: Sequence[str]) -> UsageError:
        first = next((name for name, split in splits.items() if split == "train"), "FOLDER")
        shown = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
        both = len({splits[name] for name in names if name in splits}) == 1 and len(names) > 1
        if both:
            asked = f"the folders {shown} all look like {splits[names[0]]}."
        elif len(names) > 1:
            asked = f"are the folders {shown} splits, classes or neither?"
        else:
            asked = f"is the folder {shown} a split, a class or neither?"
        return UsageError(
            f"{self._root / base}: {asked} Name those of the splits, as in "
            f"--splits train={_join(base, first)},test={_join(base, names[-1])}; --splits none "
            "makes all folders classes"
        )

    def _content(self, base: str) -> dict[str, _Content]:
        """What the folders right below `base` hold; under "" the images that lie in none."""
        start = f"{base}/" if base else ""
        held: dict[str, _Content] = {}
        for path in self._files:
            if path.startswith(start):
                top, slash, rest = path[len(start) :].partition("/")
                content = held.setdefault(top if slash else "", _Content())
                below, slash, _ = rest.partition("/")
                if slash:
                    content.below[below] += 1
                else:
                    content.direct += 1
        return held


def _certain(names: Mapping[str, _Name]) -> dict[str, str]:
    """The split of each folder whose name says so: alone, or with another of the same rest."""
    by_rest: dict[tuple[str, ...], set[str]] = {}
    for name in names.values():
        if name.split is not None:
            by_rest.setdefault(name.rest, set()).add(name.split)
    return {
        folder: name.split
        for folder, name in names.items()
        if name.split is not None
        and (not name.rest or ("train" in by_rest[name.rest] and len(by_rest[name.rest]) > 1))
    }


def _join(base: str, name: str) -> str:
    return f"{base}/{name}" if base else name
