"""audit.html: the findings with their pictures, in one file that needs no network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from distcls.audit.findings import KINDS, Finding
from distcls.data.image_dataset import Opened
from distcls.errors import BadImage
from distcls.page import Html, joined, page, picture, section, table, tag, tiles

SHOWN = 24
"""Findings of a kind that the page shows; audit.csv has all."""


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
    details = ", ".join(part for part in (finding.split, finding.label) if part)
    name = finding.image or finding.label
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
        if at is None:
            continue
        record = inside.records[at]
        try:
            image = inside.source_of(record.split).image(record.index)
        except BadImage:
            continue
        found.append(picture(image, record.image_id))
    return found
