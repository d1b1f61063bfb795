"""The findings with their pictures: audit.html, one file that needs no network, and a grid of the
labels that are probably wrong."""

from __future__ import annotations

import itertools
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from distcls import log, plotting
from distcls.audit.findings import KINDS, Finding
from distcls.data.image_dataset import Opened
from distcls.data.source import Images
from distcls.errors import BadImage, legible, plain
from distcls.page import Html, joined, page, picture, section, table, tag, tiles

SHOWN = 24
"""Findings of a kind that the page shows; audit.csv has all."""
DRAWN = 400
"""Pixels of the longer side of a picture that is drawn."""


def audit_page(title: str, about: str, findings: Sequence[Finding], inside: Opened) -> str:
    """The page's HTML. Some images are read once more for their pictures."""
    grouped = [
        (severity, kind, [*found])
        for (severity, kind), found in itertools.groupby(
            findings, key=lambda each: (each.severity, each.kind)
        )
    ]
    rows = [
        [tag("a", KINDS[kind], href=f"#{severity}-{kind}"), _severity(severity), f"{len(found):,}"]
        for severity, kind, found in grouped
    ]
    summary = table(["finding", "severity", "images"], rows, numbers=2)
    sections = [section("summary", "Summary", summary if rows else tag("p", "Nothing was found."))]
    for severity, kind, found in grouped:
        few = "" if len(found) <= SHOWN else f" The first {SHOWN} of them:"
        note = tag("p", _severity(severity), f": {len(found):,}.{few}")
        sections.append(
            section(f"{severity}-{kind}", KINDS[kind], note, finding_tiles(found[:SHOWN], inside))
        )
    return page(title, tag("p", about), sections)


def finding_tiles(findings: Sequence[Finding], inside: Opened) -> Html:
    """Findings with the pictures that they are about."""
    return tiles(_tile(finding, inside) for finding in findings)


def _severity(severity: str) -> Html:
    classes = {"error": "bad", "warning": "warning"}
    return tag("span", severity, class_=classes.get(severity, "soft"))


def _tile(finding: Finding, inside: Opened) -> Html:
    pictures = _pictures(finding, inside)
    details = ", ".join(legible(part) for part in (finding.split, finding.label) if part)
    name = legible(finding.image or finding.label or finding.split)
    return joined(
        [
            tag("div", *pictures, class_="pair" if len(pictures) > 1 else None),
            tag("b", name),
            tag("div", details, class_="name") if finding.image else "",
            tag("div", finding.text),
        ]
    )


def _pictures(finding: Finding, inside: Opened) -> list[Html]:
    found = []
    for at in (finding.position, finding.related_position):
        image = None if at is None else _image(at, inside)
        if at is not None and image is not None:
            found.append(picture(image, legible(inside.records[at].image_id)))
    return found


def _image(at: int, inside: Opened) -> Images | None:
    """The image at a position; None if it is broken."""
    record = inside.records[at]
    try:
        return inside.source_of(record.split).image(record.index)
    except BadImage:
        return None


def draw_label_errors(
    findings: Sequence[Finding], inside: Opened, path: Path, accuracy: float
) -> None:
    """The images whose labels are the least probable, as a PNG: the label and the class that the
    models say, with their probabilities; `accuracy` is how often the models are right. Raises
    UsageError without matplotlib."""
    tiles = []
    for each in findings[:SHOWN]:
        image = None if each.position is None else _image(each.position, inside)
        if image is not None:
            rows = (
                ("labelled", each.label, each.value),
                ("rather", each.related, each.related_value),
            )
            text = "\n".join(_wrapped(word, name, chance or 0.0) for word, name, chance in rows)
            tiles.append(plotting.Tile(image=_reduced(image), text=text, name=_place(each)))
    which = "the worst of " if len(findings) > SHOWN else ""
    title = (
        f"{which}{log.counted(len(findings), 'label')} that the other images contradict; the "
        f"models are right for {accuracy:.1%} of the images"
    )
    plotting.draw_grid(tiles, path, title=title)


def _wrapped(word: str, name: str, chance: float) -> str:
    """A word, a class name and its probability, in lines that fit below an image; a letter of CJK
    takes two."""
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in name)
    most = plotting.LETTERS // (2 if wide else 1)
    return "\n".join(textwrap.wrap(f"{word} “{plain(name, 4 * most)}” {chance:.2f}", most))


def _place(finding: Finding) -> str:
    """The split and the name of an image, of a long name the end."""
    name = plain(finding.image)
    most = plotting.LETTERS
    if len(name) > most or not name.startswith(f"{finding.split}/"):
        split = f"{finding.split}: " if finding.split else ""
        most -= len(split)
        return split + (name if len(name) <= most else f"…{name[1 - most :]}")
    return name


def _reduced(image: Images) -> Images:
    """The image, its longer side `DRAWN` pixels at most."""
    height, width = image.shape[:2]
    scale = DRAWN / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
