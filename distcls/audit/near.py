"""Near duplicates: the same picture shifted, encoded again, brighter or darker, or of another size.

An image is a small grey thumbnail. Its descriptor is the magnitude of the Fourier transform of its
Laplacian, which a shift does not change and brightness only scales, reduced to a few numbers
by principal components. Images with near descriptors are candidates, found by an inverted file:
spherical k-means cells, and each image is compared with those of the cells near its own, so the
work grows with the number of images times COMPARED (Sivic, Zisserman: Video Google, 2003). Whether
a pair is one picture is then seen on the thumbnails: aligned, with gain and offset fitted, the
largest local difference that is left has to be small.

Perceptual hashes do not do here: of 20,000 pictures of clothes another one is 4 of 64 bits away by
dHash and 8 by pHash (median), the same one shifted by a pixel of 28 is 9 and 14 away.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from distcls.audit.scan import Rows

Thumbs = NDArray[np.uint8]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

DIMENSIONS = 96
"""Principal components of a descriptor."""
FITTED = 20_000
"""Images that these are computed from."""
COMPARED = 8192
"""Images that an image is compared with; all of them where there are no more."""
NEIGHBOURS = 4
"""Candidates that are looked at for each image."""
LEAST_COSINE = 0.5
"""Of descriptors, from which a pair is a candidate."""
FARTHEST = 0.15
"""Shift that is found, as a fraction of the thumbnail's side."""
LEAST_ALIKE, MOST_ALIKE, ABOVE = 2.0, 3.4, 2.3
"""Score from which two images are one picture: so much above the score that as many pairs reach as
a fifth of the images, within these bounds. Photographs of different things have scores near 0, of
70,000 pictures of clothes many reach 1.3; chosen on both, with copies in them."""
LEAST_USED = 0.1
"""Fraction of the pixels that have to be unclipped for a fit to leave the others out."""
MOST_GAIN = 3.0
"""Brightness, as a factor, up to which two pictures may be one."""
FLAT = 1.0
"""Standard deviation of a thumbnail up to which there is nothing to compare."""
BLOCK = 1024
PAIRS = 2048
"""Thumbnails, and pairs of them, that are computed together."""


class Vectors(Protocol):
    """Unit vectors [N, D], in memory or in a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, chosen: Integers, /) -> Floats:
        """Those of these numbers."""


class Pair(NamedTuple):
    """Two images that are nearly the same."""

    first: int
    second: int
    score: float


def near_pairs(thumbs: Rows, among: Integers) -> list[Pair]:
    """The pairs of near duplicates among some of the thumbnails, uint8 [N, side, side].

    Of many copies of one picture each is in a pair with some of the others. Images without any
    texture are in none.
    """
    spreads = [part.std((1, 2)) for part in _blocks(thumbs, among)]
    textured = among[np.concatenate([*spreads, np.zeros(0)]) > FLAT]
    if len(textured) < 2:
        return []
    first, second = (textured[places] for places in candidates(describe(thumbs, textured)))
    scores = [
        compare(thumbs[first[start : start + PAIRS]], thumbs[second[start : start + PAIRS]])
        for start in range(0, len(first), PAIRS)
    ]
    if not scores:
        return []
    score = np.concatenate(scores)
    rank = len(textured) // 5
    common = np.sort(score)[-rank - 1] if rank < len(score) else 0.0
    alike = np.clip(common + ABOVE, LEAST_ALIKE, MOST_ALIKE)
    return [
        Pair(int(first[at]), int(second[at]), round(float(score[at]), 2))
        for at in np.flatnonzero(score >= alike).tolist()
    ]


def _blocks(thumbs: Rows, chosen: Integers) -> Iterator[Thumbs]:
    for start in range(0, len(chosen), BLOCK):
        yield thumbs[chosen[start : start + BLOCK]]


def describe(thumbs: Rows, chosen: Integers) -> Floats:
    """Descriptors of the thumbnails `chosen`, float32 [n, D], each of length 1."""
    step = max(1, len(chosen) // FITTED)
    few = chosen[::step]
    sample = _gathered(map(_spectra, _blocks(thumbs, few)), len(few))
    mean = sample.mean(0)
    for start in range(0, len(sample), BLOCK):
        sample[start : start + BLOCK] = unit(sample[start : start + BLOCK] - mean)
    axes = np.linalg.eigh(sample.T @ sample)[1][:, ::-1][:, :DIMENSIONS]
    del sample
    parts = (unit(unit(_spectra(part) - mean) @ axes) for part in _blocks(thumbs, chosen))
    return _gathered(parts, len(chosen))


def _gathered(parts: Iterable[Floats], count: int) -> Floats:
    """Arrays of one row or more as one of `count` rows; a list of them would take as much again."""
    left = iter(parts)
    first = next(left)
    whole = np.empty((count, *first.shape[1:]), first.dtype)
    end = 0
    for part in itertools.chain([first], left):
        whole[end : end + len(part)] = part
        end += len(part)
    return whole


def unit(vectors: Floats) -> Floats:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-6), np.float32)


def _laplacian(images: Floats) -> Floats:
    """[n, height, width] to [n, height - 2, width - 2]."""
    middle = images[:, 1:-1, 1:-1]
    around = images[:, 2:, 1:-1] + images[:, :-2, 1:-1] + images[:, 1:-1, 2:] + images[:, 1:-1, :-2]
    return 4 * middle - around


def _window(size: int) -> Floats:
    """The square root of a Hann window, in both directions."""
    one = np.sqrt(np.hanning(size + 2)[1:-1]).astype(np.float32)
    return np.outer(one, one)


def _spectra(thumbs: Thumbs) -> Floats:
    """Square roots of the magnitudes of the lower frequencies, [n, F]."""
    edges = _laplacian(thumbs.astype(np.float32))
    side = edges.shape[1]
    size = side + 6
    kept = max(2, size * 3 // 8)
    spectrum = np.abs(np.fft.rfft2(edges * _window(side), s=(size, size)))[:, :, :kept]
    low = np.concatenate([spectrum[:, :kept], spectrum[:, 1 - kept :]], axis=1)
    return unit(np.sqrt(low.reshape(len(thumbs), -1)).astype(np.float32))


def candidates(vectors: Vectors, neighbours: int = NEIGHBOURS) -> tuple[Integers, Integers]:
    """Pairs of unit vectors [N, D] of which one is among the nearest of the other, sorted."""
    count = len(vectors)
    cells = max(1, round(count**0.5)) if count > COMPARED else 1
    home, centers = _cluster(vectors, cells)
    order = np.argsort(home, kind="stable")
    ends = np.cumsum(np.bincount(home, minlength=cells))
    starts = ends - np.diff(ends, prepend=0)
    keys: list[Integers] = []
    for cell in range(cells):
        own = order[starts[cell] : ends[cell]]
        near = np.argsort(-(centers @ centers[cell]), kind="stable")
        near = near[: np.searchsorted(np.cumsum((ends - starts)[near]), COMPARED) + 1]
        others = np.concatenate([order[starts[each] : ends[each]] for each in near])
        known = vectors[others]
        for part in np.split(own, range(512, len(own), 512)):
            one, other = _nearest(vectors[part], part, known, others, neighbours)
            keys.append(np.minimum(one, other) * count + np.maximum(one, other))
    pairs = np.unique(np.concatenate(keys))
    return pairs // count, pairs % count


def _cluster(vectors: Vectors, cells: int) -> tuple[Integers, Floats]:
    """Spherical k-means: the cell of each vector, and the centres [cells, D]."""
    rng = np.random.default_rng(0)
    centers = vectors[rng.choice(len(vectors), cells, replace=False)]
    sample = vectors[rng.permutation(len(vectors))[: 64 * cells]]
    for _ in range(5 if cells > 1 else 0):
        home = _home(sample, centers)
        sums = np.zeros_like(centers)
        np.add.at(sums, home, sample)
        empty = np.bincount(home, minlength=cells) == 0
        centers = np.where(empty[:, None], centers, unit(sums))
    return _home(vectors, centers), centers


def _home(vectors: Vectors, centers: Floats) -> Integers:
    """The nearest of the centres for each vector."""
    every = np.arange(len(vectors))
    parts = np.split(every, range(BLOCK, len(every), BLOCK))
    return np.concatenate([(vectors[part] @ centers.T).argmax(1) for part in parts])


def _nearest(
    vectors: Floats, own: Integers, known: Floats, others: Integers, neighbours: int
) -> tuple[Integers, Integers]:
    """The pairs of `own`, of these vectors, with their nearest among `others`, which are `known`:
    the first of each, and the second."""
    distances = vectors @ known.T
    np.negative(distances, out=distances)
    distances[own[:, None] == others[None]] = 1
    most = min(neighbours, len(others))
    places = np.argpartition(distances, most - 1, axis=1)[:, :most]
    good = np.take_along_axis(distances, places, axis=1) <= -LEAST_COSINE
    return np.broadcast_to(own[:, None], places.shape)[good], others[places][good]


def compare(first: Thumbs, second: Thumbs) -> Floats:
    """How much pairs of thumbnails, uint8 [n, side, side] each, are one picture: [n].

    From the better of two fits, of the second to the first and the other way round, for what is
    saturated in one of them is not in the other.
    """
    one, other = first.astype(np.float32), second.astype(np.float32)
    shifts = _shifts(one, other)
    scores = np.zeros(len(one), np.float32)
    for dy, dx in sorted(set(map(tuple, shifts.tolist()))):
        rows = np.flatnonzero((shifts == (dy, dx)).all(1))
        left, right = _overlap(one[rows], other[rows], dy, dx)
        scores[rows] = np.maximum(_fit(left, right), _fit(right, left))
    return scores


def _shifts(one: Floats, other: Floats) -> Integers:
    """How far each second image is moved down and to the right, [n, 2]: where the correlation of
    the Laplacians is largest."""
    side = one.shape[1]
    most = max(1, round(FARTHEST * side))
    size = side + 6
    window = _window(side - 2)
    spectra = [np.fft.rfft2(_laplacian(each) * window, s=(size, size)) for each in (one, other)]
    correlation = np.fft.irfft2(spectra[1] * np.conj(spectra[0]), s=(size, size))
    allowed = np.r_[0 : most + 1, size - most : size]
    inside = correlation[:, allowed][:, :, allowed].reshape(len(one), -1).argmax(1)
    moves = np.where(allowed > most, allowed - size, allowed)
    return np.stack([moves[inside // len(allowed)], moves[inside % len(allowed)]], axis=1)


def _overlap(one: Floats, other: Floats, dy: int, dx: int) -> tuple[Floats, Floats]:
    """What both show, the second being moved by (dy, dx)."""
    height, width = one.shape[1:]
    left = one[:, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
    right = other[:, max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
    return left, right


def _fit(image: Floats, target: Floats) -> Floats:
    """The score of `target` as `image` with another gain and offset, moved by less than a pixel."""
    inner, wanted = image[:, 1:-1, 1:-1], target[:, 1:-1, 1:-1].reshape(len(target), -1)
    slopes = image[:, 2:, 1:-1] - image[:, :-2, 1:-1], image[:, 1:-1, 2:] - image[:, 1:-1, :-2]
    down, right = (np.linspace(-1, 1, length, dtype=np.float32) for length in inner.shape[1:])
    grown = slopes[0] * down[:, None], slopes[1] * right
    terms = np.stack([inner, np.ones_like(inner), *slopes, *grown], axis=1)
    terms = terms.reshape(len(image), 6, -1)
    open_ends = (wanted > 2) & (wanted < 253)
    fitted = terms[:, 0]
    solved = np.zeros((len(image), 6, 1), np.float32)
    for _ in range(3):  # a pixel that is clipped in one of them tells nothing of gain and offset
        used = open_ends & (fitted > 1) & (fitted < 254)
        used |= used.mean(1, keepdims=True) < LEAST_USED
        weighted = terms * used[:, None]
        normal = weighted @ terms.transpose(0, 2, 1) + 0.1 * np.eye(6, dtype=np.float32)
        solved = np.linalg.solve(normal, weighted @ wanted[:, :, None])
        fitted = (terms * solved).sum(1)
    left = (np.clip(fitted, 0, 255) - wanted).reshape(inner.shape)
    scores = _score(_blurred(left), _blurred(wanted.reshape(inner.shape)))
    gain, moved = solved[:, 0, 0], 2 * np.abs(solved[:, 2:, 0]).max(1)
    sensible = (gain > 1 / MOST_GAIN) & (gain < MOST_GAIN) & (moved < gain)
    return np.asarray(np.where(sensible, scores, 0), np.float32)


def _blurred(images: Floats) -> Floats:
    """[n, height, width] by the binomial filter of three, to [n, height - 2, width - 2]."""
    rows = images[:, :-2] + 2 * images[:, 1:-1] + images[:, 2:]
    return np.asarray((rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16)


def _score(left: Floats, wanted: Floats) -> Floats:
    """From what a fit leaves: the unexplained part of the variance, and the largest difference in
    standard deviations, both as negative powers of ten, added up."""
    spread = wanted.var((1, 2)) + 1e-3
    rest = (left * left).mean((1, 2)) / spread
    largest = np.abs(left).max((1, 2)) / np.sqrt(spread)
    return np.asarray(-np.log10(np.maximum(rest, 1e-5)) - np.log10(np.maximum(largest, 1e-3)))
