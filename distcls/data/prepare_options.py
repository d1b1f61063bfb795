"""What `distcls prepare` can be told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from distcls.config import bare, positional
from distcls.data.resample import Resampling, require_one_rule
from distcls.data.sources.answers import AnswerColumns
from distcls.data.sources.detect import Format
from distcls.errors import BadValue, require

VAL_FRACTION = 0.1
"""Where nothing else is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What `distcls prepare` is asked to do."""

    source: str = positional()
    """`digits` (bundled with scikit-learn), a folder of IDX files (MNIST, FashionMNIST), a folder
    with one folder a class, or a CSV or Parquet manifest."""
    out: Path
    """Dataset directory to write; must not exist."""
    format: Format = "auto"
    """Kind of the source; auto detects it. mnist and fashion-mnist insist on the published MD5s,
    idx on none."""
    classes: Path | None = None
    """File of class names in label order (JSON list, or one a line); other labels are errors."""
    weight_column: str | None = None
    """Column of the manifest that says how much each image counts in training; unset, `weight`
    where there is one."""
    label_columns: tuple[str, ...] = ()
    """Columns of the manifest, such as colour,shape: an image has a class in each, a head each."""
    text_column: str | None = None
    """Column of the manifest with a text, such as a captcha's: a head a character; shorter texts
    end in blanks."""
    labels_column: str | None = None
    """Column of the manifest with any number of labels an image, none included."""
    separator: str | None = None
    """With labels_column: what stands between the labels; unset, |."""
    val_fraction: float | None = None
    """Part of each class for validation, where the source has no validation split; unset, 0.1."""
    test_fraction: float = 0.2
    """Part of each class for testing, where the source has no test split."""
    folds: int | None = None
    """Cross-validation: cut the training images into so many folds, alike in their classes; `fold`
    is for validation, the others are for training."""
    fold: int | None = None
    """With folds: which of them, counted from 1."""
    bootstrap: int | None = bare("1")
    """A bootstrap sample: training images drawn with replacement, the times that each is drawn as
    its weight; those never drawn (37 %) are for validation. Its number, 1 where none is given: with
    other numbers other samples of the same images."""
    seed: int = 0
    """Seed of the splits (also of folds and bootstrap samples) and of `limit`."""
    limit: int | None = None
    """Take at most so many images, drawn evenly over splits and classes."""
    write_images: bool = False
    """Also write OUT/images/SPLIT/CLASS/ID.png."""
    pack: Literal["auto", "on", "off"] = "auto"
    """Keep the decoded images in one file; auto does up to 4 GiB and 256x256 pixels on average."""
    json: bool = False
    """Print one JSON object with the counts."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        require_one_rule(self.folds, self.fold, self.bootstrap, self.val_fraction)
        for name in ("val_fraction", "test_fraction"):
            fraction = getattr(self, name)
            valid = fraction is None or 0 <= fraction < 1
            require(valid, name, fraction, "at least 0 and below 1")
        total = self.resolved_val_fraction + self.test_fraction
        rest = "together with test_fraction below 1, training gets the rest"
        require(total < 1, "val_fraction", self.resolved_val_fraction, rest)
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        if self.answers is not None and self.write_images:
            expected = f"false with {self.answers.options[0]}: it makes one folder a class"
            raise BadValue("write_images", self.write_images, expected)

    @property
    def answers(self) -> AnswerColumns | None:
        """Where the manifest holds several answers an image, if it was said."""
        columns = AnswerColumns(
            label_columns=self.label_columns,
            text_column=self.text_column,
            labels_column=self.labels_column,
            separator=self.separator,
        )
        return columns if columns.names else None

    @property
    def resolved_val_fraction(self) -> float:
        """The fraction that is cut off for validation, as given or usual."""
        if self.resampling is not None:
            return 0.0
        return VAL_FRACTION if self.val_fraction is None else self.val_fraction

    @property
    def resampling(self) -> Resampling | None:
        """How the training images are divided instead."""
        folds, fold, bootstrap = self.folds, self.fold, self.bootstrap
        if folds is None and bootstrap is None:
            return None
        return Resampling(folds=folds or 1, fold=fold or 1, bootstrap=bootstrap)
