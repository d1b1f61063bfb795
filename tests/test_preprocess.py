"""The one preprocessing: geometry the right way round, against references in plain NumPy."""

from __future__ import annotations

import json
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distcls.errors import BadValue
from distcls.imaging import INTERPOLATIONS, RESIZES, Preprocess
from tests.pictures import BLUE, GREEN, RED, WHITE, Pixels, corners, smooth


def four(picture: Pixels) -> list[tuple[int, ...]]:
    """The colours one pixel inside the four corners, in reading order."""
    places = ((1, 1), (1, -2), (-2, 1), (-2, -2))
    return [tuple(picture[place].tolist()) for place in places]


@pytest.mark.parametrize("size", [(20, 60), (60, 20), (40, 40), (80, 120)])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (30, 90)])
@pytest.mark.parametrize("resize", RESIZES)
def test_non_square_sizes_the_right_way_round(
    resize: str, shape: tuple[int, int], size: tuple[int, int]
) -> None:
    process = Preprocess(size=size, resize=resize)  # type: ignore[arg-type]
    picture = corners(*shape)
    result = process(picture)
    assert result.shape == (*size, 3)
    assert result.dtype == np.uint8
    if resize == "pad":
        rows, columns = np.nonzero(result.any(axis=2))
        result = result[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert four(result) == [RED, GREEN, BLUE, WHITE]


def test_squash_equals_block_means() -> None:
    picture = smooth(24, 36)
    result = Preprocess(size=(8, 9), resize="squash")(picture)
    means = picture.reshape(8, 3, 9, 4, 3).mean(axis=(1, 3))
    assert np.abs(result - means).max() <= 0.51


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_each_interpolation_is_the_one_it_names(interpolation: str) -> None:
    flags = {
        "area": cv2.INTER_AREA,
        "linear": cv2.INTER_LINEAR,
        "cubic": cv2.INTER_CUBIC,
        "lanczos": cv2.INTER_LANCZOS4,
        "nearest": cv2.INTER_NEAREST_EXACT,
    }
    picture = smooth(24, 36)
    process = Preprocess(size=(10, 50), resize="squash", interpolation=interpolation)  # type: ignore[arg-type]
    expected = cv2.resize(picture, (50, 10), interpolation=flags[interpolation])
    assert np.array_equal(process(picture), expected)


def test_area_agrees_with_pillows_box_filter() -> None:
    picture = smooth(60, 90)
    result = Preprocess(size=(20, 30), resize="squash")(picture)
    pillow = np.asarray(Image.fromarray(picture).resize((30, 20), Image.Resampling.BOX))
    assert np.abs(result.astype(int) - pillow).max() <= 1


def test_crop_keeps_the_centre() -> None:
    columns = np.arange(60, dtype=np.uint8)[None, :, None] * 4
    wide = np.broadcast_to(columns, (20, 60, 3)).copy()
    assert np.array_equal(Preprocess(size=(20, 20))(wide), wide[:, 20:40])
    tall = wide.transpose(1, 0, 2).copy()
    assert np.array_equal(Preprocess(size=(20, 20))(tall), tall[20:40])
    half = wide[::2, ::2][:, 5:25]
    assert np.abs(Preprocess(size=(10, 20))(wide).astype(int) - half).max() <= 2


def test_crop_fraction_is_resize_then_centre_crop() -> None:
    picture = smooth(64, 96)
    result = Preprocess(size=(28, 28), crop_fraction=0.875)(picture)
    scaled = cv2.resize(picture, (48, 32), interpolation=cv2.INTER_AREA)
    assert np.array_equal(result, scaled[2:30, 10:38])


def test_crop_fraction_counts_for_images_of_the_inputs_own_size() -> None:
    picture = smooth(32, 32)
    process = Preprocess(size=(32, 32), crop_fraction=0.5)
    assert not process.keeps(picture.shape)
    assert np.array_equal(
        process(picture), cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA)[16:48, 16:48]
    )
    assert Preprocess(size=(32, 32), resize="pad", crop_fraction=0.5).keeps(picture.shape)


def test_pad_shows_all_on_black() -> None:
    picture = np.full((20, 40, 3), 200, np.uint8)
    result = Preprocess(size=(40, 40), resize="pad")(picture)
    assert (result[10:30] == 200).all()
    assert not result[:10].any()
    assert not result[30:].any()
    small = Preprocess(size=(10, 30), resize="pad")(picture)
    assert (small[:, 5:25] == 200).all()
    assert not small[:, :5].any()
    assert not small[:, 25:].any()


def test_the_right_size_passes_untouched() -> None:
    picture = smooth(24, 36)
    for resize in RESIZES:
        process = Preprocess(size=(24, 36), resize=resize)
        assert process.keeps(picture.shape)
        assert process(picture) is picture
        assert not process.keeps((36, 24, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(RESIZES),
    st.sampled_from(INTERPOLATIONS),
    st.floats(0.3, 1),
)
def test_any_shape_comes_out_at_the_size(
    shape: tuple[int, int], size: tuple[int, int], resize: str, interpolation: str, part: float
) -> None:
    process = Preprocess(
        size=size,
        resize=resize,  # type: ignore[arg-type]
        interpolation=interpolation,  # type: ignore[arg-type]
        crop_fraction=part,
    )
    even = np.full((*shape, 3), 77, np.uint8)
    result = process(even)
    assert result.shape == (*size, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert set(np.unique(result)) <= ({0, 77} if resize == "pad" else {77})


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1)])
def test_a_line_of_pixels_takes_no_gigabytes(resize: str, shape: tuple[int, int]) -> None:
    line = np.zeros((*shape, 3), np.uint8)
    line.reshape(-1, 3)[9_000:11_000] = 200
    process = Preprocess(size=(64, 64), resize=resize)  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        result = process(line)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.shape == (64, 64, 3)
    assert peak < 20_000_000
    if resize == "crop":
        assert (result == 200).all()


def test_json_round_trip() -> None:
    process = Preprocess(
        size=(28, 40),
        resize="pad",
        interpolation="cubic",
        crop_fraction=0.875,
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    text = json.dumps(process.to_json())
    assert Preprocess.from_json(json.loads(text)) == process


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", (0, 5)),
        ("size", (5, -1)),
        ("resize", "stretch"),
        ("interpolation", "bicubic"),
        ("crop_fraction", 0.0),
        ("crop_fraction", 1.1),
        ("crop_fraction", float("nan")),
        ("std", (0.1, 0.0, 0.1)),
    ],
)
def test_bad_values_name_the_field(field: str, value: object) -> None:
    values: dict[str, object] = {"size": (32, 32), field: value}
    with pytest.raises(BadValue) as caught:
        Preprocess(**values)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert repr(value) in str(caught.value)
