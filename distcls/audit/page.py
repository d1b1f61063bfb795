"""audit.html: the findings with their pictures, in one file that needs no network."""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from distcls.audit.findings import KINDS, SEVERITIES, Finding
from distcls.data.image_dataset import Opened
from distcls.errors import BadImage

SHOWN = 24
"""Findings of a kind that the page shows; audit.csv has all."""
SIDE = 128
"""Longer side of a picture on the page; larger images are embedded at twice that."""

STYLE = """
:root { color-scheme: light dark; --line: #d1d5db; --soft: #6b7280; --error: #b91c1c;
  --warning: #b45309; --info: #1d4ed8; }
@media (prefers-color-scheme: dark) { :root { --line: #374151; --soft: #9ca3af; --error: #f87171;
  --warning: #fbbf24; --info: #93c5fd; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h2 { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1rem; }
.error { color: var(--error); } .warning { color: var(--warning); } .info { color: var(--info); }
table { border-collapse: collapse; } td { padding: .1rem 1rem .1rem 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17.5rem, 1fr)); }
figure { margin: 0; border: 1px solid var(--line); border-radius: .4rem; padding: .5rem; }
figure img { height: 8rem; max-width: 48%; object-fit: contain; margin-right: 2%;
  background: #8883; }
figure img.small { image-rendering: pixelated; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; } figcaption small { color: var(--soft); }
@media print { figure { break-inside: avoid; } }
"""


def page(title: str, about: str, findings: Sequence[Finding], inside: Opened) -> str:
    """The page's HTML. Some images are read once more for their pictures."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>",
    ]
    grouped = [
        (kind, [*found])
        for kind, found in itertools.groupby(findings, key=lambda each: (each.severity, each.kind))
    ]
    parts.append("<table>" if grouped else "<p>Nothing was found.</p>")
    for number, ((severity, kind), found) in enumerate(grouped):
        parts.append(
            f'<tr><td class="{severity}">{severity}</td><td class="number">{len(found):,}</td>'
            f'<td><a href="#k{number}">{html.escape(KINDS[kind])}</a></td></tr>'
        )
    parts.append("</table>" if grouped else "")
    for number, ((severity, kind), found) in enumerate(grouped):
        assert severity in SEVERITIES
        shown = "" if len(found) <= SHOWN else f", the first {SHOWN} of them"
        parts.append(
            f'<h2 id="k{number}"><span class="{severity}">{severity}</span>: '
            f"{html.escape(KINDS[kind])} ({len(found):,}{shown})</h2><div class='grid'>"
        )
        parts += [_figure(each, inside) for each in found[:SHOWN]]
        parts.append("</div>")
    return "\n".join([*parts, "</body></html>", ""])


def _figure(finding: Finding, inside: Opened) -> str:
    pictures = "".join(_pictures(finding, inside))
    details = " · ".join(part for part in (finding.split, finding.label) if part)
    name = finding.image or finding.label
    return (
        f"<figure>{pictures}<figcaption><b>{html.escape(name)}</b> "
        f"<small>{html.escape(details if finding.image else '')}</small><br>"
        f"{html.escape(finding.text)}</figcaption></figure>"
    )


def _pictures(finding: Finding, inside: Opened) -> Iterator[str]:
    for at in (finding.position, finding.related_position):
        if at is None:
            continue
        record = inside.records[at]
        try:
            image = inside.source_of(record.split).image(record.index)
        except BadImage:
            continue
        alt = html.escape(record.image_id, quote=True)
        small = ' class="small"' if max(image.shape[:2]) < SIDE else ""
        yield f'<img{small} alt="{alt}" src="data:image/{_encoded(image)}">'


def _encoded(image: np.ndarray) -> str:
    """The end of a data URL: small images as they are, larger ones as JPEG."""
    scale = SIDE * 2 / max(image.shape[:2])
    kind, options = ("png", []) if scale > 4 else ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 80])
    if scale < 1:
        size = tuple(max(1, round(length * scale)) for length in image.shape[1::-1])
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    ending = ".png" if kind == "png" else ".jpg"
    _, data = cv2.imencode(ending, np.ascontiguousarray(image[..., ::-1]), options)
    return f"{kind};base64,{base64.b64encode(data.tobytes()).decode()}"
