"""Anything may be in a file: it is read as it says, or refused in one line, within time and memory.

`make test` tries some hundred mutations; `make test-slow` as many of each kind as the environment
variable DISTCLS_MUTATIONS says, and prints what became of them.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from distcls.config.load import parse_yaml
from distcls.data.dataset import INFO, Dataset
from distcls.errors import DistclsError
from distcls.imaging import decode
from distcls.imaging.decode import _read_header
from distcls.model_card import ModelCard
from distcls.runtime.model import OnnxModel
from distcls.training.config import TrainConfig
from tests import tiny_dataset
from tests.pictures import encode, smooth

MODEL = "v076daf9/whole/best.onnx"
FEW = 60
MANY = int(os.environ.get("DISTCLS_MUTATIONS", "1000"))
MOST_PIXELS = 1_000_000
LONGEST = 2.0
"""Seconds of processor time for one mutation."""
MOST_MEMORY = 300 << 10
"""KiB that all mutations together may add to the process's peak."""

PICTURE = smooth(40, 56)
CLEAR = Image.fromarray(PICTURE).convert("RGBA")
FRAMES = {"save_all": True, "append_images": [CLEAR.rotate(180)]}
SOURCES = {
    "PNG": encode(PICTURE, "PNG"),
    "PNG, alpha": encode(CLEAR, "PNG"),
    "PNG, animated": encode(CLEAR, "PNG", **FRAMES, default_image=True),
    "JPEG": encode(PICTURE, "JPEG"),
    "JPEG, progressive": encode(PICTURE, "JPEG", progressive=True),
    "GIF": encode(PICTURE, "GIF"),
    "GIF, animated": encode(CLEAR, "GIF", **FRAMES),
    "WebP": encode(PICTURE, "WEBP"),
    "WebP, lossless": encode(CLEAR, "WEBP", lossless=True),
    "WebP, animated": encode(CLEAR, "WEBP", **FRAMES),
    "TIFF": encode(PICTURE, "TIFF"),
    "TIFF, LZW": encode(PICTURE, "TIFF", compression="tiff_lzw"),
    "TIFF, Deflate": encode(PICTURE, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, PackBits": encode(PICTURE, "TIFF", compression="packbits"),
    "TIFF, JPEG": encode(PICTURE, "TIFF", compression="jpeg"),
    "BMP": encode(PICTURE, "BMP"),
    "PNM": encode(PICTURE, "PPM"),
}

PLACE = st.floats(0, 1, exclude_max=True)
MUTATION = st.one_of(
    st.tuples(st.just("flip"), PLACE, st.integers(0, 7)),
    st.tuples(st.just("cut"), PLACE, PLACE),
    st.tuples(st.just("end"), PLACE, st.none()),
    st.tuples(st.just("insert"), PLACE, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("repeat"), PLACE, PLACE),
    st.tuples(st.just("number"), PLACE, st.sampled_from([0, 1, 255, 2**15, 2**16 - 1, 2**31])),
    st.tuples(st.just("zeros"), PLACE, PLACE),
)


def mutated(data: bytes, kind: str, place: float, what: Any) -> bytes:
    """The bytes with one thing wrong; most places are in the first hundred, where headers are."""
    at = int(place * 2 * min(100, len(data) / 2)) if place < 0.5 else int(place * len(data))
    end = at + 1 + int(what * (len(data) - at) / 4) if isinstance(what, float) else at
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :]
    if kind == "number":
        order, size = ("big" if place * 1000 % 1 < 0.5 else "little"), 2 if what < 2**16 else 4
        return data[:at] + what.to_bytes(size, order) + data[at + size :]  # type: ignore[arg-type]
    middle = {
        "cut": b"",
        "end": b"",
        "insert": what,
        "repeat": data[at:end] * 2,
        "zeros": bytes(end - at),
    }[kind]
    return data[:at] + middle + (b"" if kind == "end" else data[end:])


class Outcomes:
    """What became of mutations, by kind."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.slowest = 0.0
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def note(self, kind: str, read: Callable[[], Any], right: Any = None) -> Any:
        """What it reads, None if it is refused. Fails for other errors, time and memory."""
        began, found, outcome, reason = time.process_time(), None, "refused", ""
        try:
            found = read()
        except DistclsError as error:
            reason = str(error)
        else:
            same = right is not None and np.array_equal(found, right)
            outcome = "without effect" if same else "taken"
        assert "\n" not in reason
        assert len(reason) < 1000
        took = time.process_time() - began
        self.slowest = max(self.slowest, took)
        assert took < LONGEST
        assert self.grown < MOST_MEMORY
        self.counts.setdefault(kind, Counter())[outcome] += 1
        return found

    @property
    def grown(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self._before

    def __str__(self) -> str:
        lines = [
            f"{kind}: {sum(found.values())} tried, {dict(sorted(found.items()))}"
            for kind, found in sorted(self.counts.items())
        ]
        return "\n".join([*lines, f"slowest {self.slowest:.2f} s, peak +{self.grown >> 10} MiB"])


@pytest.fixture
def outcomes() -> Iterator[Outcomes]:
    found = Outcomes()
    yield found
    print(found)


def sized(*sizes: int) -> Any:
    """Few examples, and many of which figures are printed."""
    few, many = sizes
    return pytest.mark.parametrize(
        "examples", [few, pytest.param(many, marks=[pytest.mark.slow, pytest.mark.timeout(0)])]
    )


def check(examples: int, *strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Run a function with so many examples."""
    quick = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]

    def run(function: Callable[..., None]) -> None:
        limits = settings(
            max_examples=examples, suppress_health_check=quick, deadline=None, database=None
        )
        limits(given(*strategies)(function))()

    return run


@pytest.mark.row(36)
@sized(4 * FEW, 8 * MANY)
def test_pictures(examples: int, outcomes: Outcomes) -> None:
    right = {kind: decode(data) for kind, data in SOURCES.items()}

    @check(
        examples,
        st.sampled_from(sorted(SOURCES)),
        st.lists(MUTATION, min_size=1, max_size=3),
        st.booleans(),
    )
    def _(kind: str, mutations: list[tuple[str, float, Any]], blended: bool) -> None:
        data = SOURCES[kind]
        for mutation in mutations:
            data = mutated(data or b"\0", *mutation)
        background = (255, 255, 255) if blended else None
        read = lambda: decode(data, MOST_PIXELS, background=background)  # noqa: E731
        image = outcomes.note(kind, read, right[kind])
        if image is not None:
            header = _read_header(data, MOST_PIXELS)
            assert image.dtype == np.uint8
            assert image.shape[2:] == (3,)
            assert sorted(image.shape[:2]) == sorted((header.height, header.width))


SYMBOLS = st.sampled_from(
    [
        *("lr", "epochs", "model", "name", "data", "seed", ":", ": ", "\n", "\n  ", "- ", "[", "]"),
        *("{", "}", ",", "&a", "*a", "!!int", "!!python/name:os.system", "!!float", "|", ">", "'"),
        *('"', "#", "%", "@", "`", "<<", "?", "---", "...", "~", "null", "012", "0x", "1e999"),
        *(".inf", ".nan", "2024-13-45", "1:30", "9" * 400, "\t", "\0", "\x85", "\ufeff", "é", " "),
    ]
)


@pytest.mark.row(42)
@sized(2 * FEW, 2 * MANY)
def test_config_texts(examples: int, outcomes: Outcomes) -> None:
    whole = "data: here\nepochs: 3\nmodel:\n  name: resnet18\noptimizer: {name: sgd}\n"

    @check(examples, st.lists(SYMBOLS | st.text(max_size=3), max_size=12), PLACE)
    def _(symbols: list[str], place: float) -> None:
        at = int(place * len(whole))
        text = whole[:at] + "".join(symbols) + whole[at:]
        found = outcomes.note("YAML", lambda: parse_yaml(text, "c.yaml"))
        if found is not None:
            outcomes.note("config", lambda: TrainConfig(**{str(k): v for k, v in found.items()}))


@pytest.mark.row(42)
@sized(FEW, MANY)
def test_flags(examples: int, outcomes: Outcomes) -> None:
    from distcls.commands.predict import COMMAND as PREDICT
    from distcls.commands.prepare import COMMAND as PREPARE
    from distcls.commands.train import COMMAND as TRAIN

    needed = {
        PREDICT.prog: ("in", "--model=m.onnx", "--out=x.csv"),
        PREPARE.prog: ("--out=x",),
        TRAIN.prog: ("--data=x", "--out=x"),
    }
    names = st.sampled_from(
        [
            *(
                "--lr",
                "--data",
                "--out",
                "--seed",
                "--model",
                "--max-bad",
                "--size",
                "--tta",
            ),
            *("--epochs", "--top-k", "--folds", "--config", "--", "-", "--=", "--lr=", "--no-such"),
        ]
    )
    values = st.text(max_size=6) | st.integers().map(str) | st.floats().map(str) | names

    @check(examples, st.sampled_from([PREDICT, PREPARE, TRAIN]), st.lists(names | values))
    def _(command: Any, flags: list[str]) -> None:
        outcomes.note(command.prog, lambda: command.parse([*flags, *needed[command.prog]]) and None)


VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([-1, 2**31, 2**63, 10**400, "\ud800", "\0", "x" * 20_000, "../..", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def changed(values: Any, path: list[float], value: Any, how: str) -> Any:
    """JSON values with one part replaced, removed or added."""
    values = copy.deepcopy(values)
    inside, where = values, None
    for step in path:
        if not isinstance(inside, dict | list) or not inside:
            break
        keys = sorted(inside) if isinstance(inside, dict) else range(len(inside))
        where = inside, keys[int(step * len(keys))]
        inside = where[0][where[1]]
    if where is None:
        return value
    if how == "remove":
        del where[0][where[1]]
    elif how == "add" and isinstance(inside, dict):
        inside["more"] = value
    else:
        where[0][where[1]] = value
    return values


PARTS = (st.lists(PLACE, max_size=4), VALUE, st.sampled_from(["replace", "remove", "add"]))


@pytest.mark.row(47)
@sized(FEW, MANY)
def test_dataset_records(examples: int, outcomes: Outcomes, tmp_path: Path) -> None:
    images, labels = tiny_dataset.coloured(6)
    folder = tiny_dataset.write(tmp_path / "data", list(images), labels, ("a", "b", "c"))
    usual = json.loads((folder / INFO).read_text())

    @check(examples, *PARTS)
    def _(path: list[float], value: Any, how: str) -> None:
        info = changed(usual, path, value, how)
        try:
            (folder / INFO).write_text(json.dumps(info))
        except UnicodeEncodeError:
            return
        if isinstance(info, dict) and isinstance(info.get("sha256"), dict):
            tiny_dataset.sign(folder)
        outcomes.note(INFO, lambda: Dataset.open(folder).split("test").labels is None)


@pytest.mark.row(47)
@sized(FEW, MANY)
def test_model_cards(examples: int, outcomes: Outcomes) -> None:
    usual = OnnxModel(Path(__file__).parent / "fixtures" / MODEL).card.to_json()

    @check(examples, *PARTS)
    def _(path: list[float], value: Any, how: str) -> None:
        card = changed(usual, path, value, how)
        outcomes.note("card", lambda: ModelCard.from_json(card, "best.pth") is None)
