"""The pieces of an HTML page that needs nothing else: tables, figures, tiles, sections."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

STYLE = Path(__file__).with_name("page.css")
SIDE = 192
"""Longer side of a thumbnail in pixels."""
QUALITY = 85
COLORS = {
    "#000000": "currentColor",
    "#374151": "currentColor",
    "#e5e7eb": "var(--line)",
    "#1f5fa8": "var(--blue)",
    "#e07b00": "var(--orange)",
    "#2e7d32": "var(--green)",
    "#c62828": "var(--red)",
    "#6b7280": "var(--grey)",
    "#7c3aed": "var(--violet)",
    "#0891b2": "var(--cyan)",
    "#be185d": "var(--pink)",
    "#4d7c0f": "var(--olive)",
    "#92400e": "var(--brown)",
}
"""Colours of drawings, and those of the page, light or dark, in their place."""
MOST_ROWS = 40
"""Rows of a table before it is folded."""

Images = NDArray[np.uint8]


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


Section = tuple[str, str, Html]
"""Anchor, title and content; see `section`."""


def text(value: object) -> Html:
    """A value as HTML: escaped, unless it is `Html`; None as a dash."""
    if isinstance(value, Html):
        return value
    if value is None:
        return Html('<span class="soft">\N{EN DASH}</span>')
    return Html(html.escape(str(value)))


def joined(parts: Iterable[object]) -> Html:
    """Pieces one after the other."""
    return Html("".join(map(text, parts)))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element; `class_` is the attribute class, an attribute that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{joined(content)}</{name}>")


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: int = 1, caption: str = ""
) -> Html:
    """A table that scrolls by itself on a small screen; columns from `numbers` on hold numbers."""
    classes = [None if place < numbers else "number" for place in range(len(head))]
    heads = [
        tag("th", each, scope="col", class_=name) for each, name in zip(head, classes, strict=True)
    ]
    body = []
    for row in rows:
        first, *others = row
        cells = [tag("th", first, scope="row")]
        cells += [tag("td", v, class_=n) for v, n in zip(others, classes[1:], strict=True)]
        body.append(tag("tr", *cells))
    title = tag("caption", caption) if caption else ""
    inner = tag("table", title, tag("thead", tag("tr", *heads)), tag("tbody", *body))
    return tag("div", inner, class_="wide", tabindex=0, role="region", aria_label=caption or None)


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values."""
    return tag("dl", *(joined([tag("dt", n), tag("dd", v)]) for n, v in pairs))


def bar(share: float) -> Html:
    """A horizontal bar, 0 to 1."""
    width = f"width:{100 * min(1.0, max(0.0, share)):.1f}%"
    return tag("span", tag("i", style=width), class_="track", aria_hidden="true")


def folded(summary: str, content: Html) -> Html:
    """Content behind a line that opens it."""
    return tag("details", tag("summary", summary), content)


def section(name: str, title: str, *content: object) -> Section:
    """Its anchor, its title, and the whole."""
    return name, title, tag("section", tag("h2", title), *content, id=name)


def drawing(path: Path, label: str, *, wide: bool = False) -> Html:
    """An SVG of `distcls.plotting` as part of the page, in the colours of its theme.

    On a phone it shrinks as far as it can be read, a `wide` one less, and scrolls by itself.
    """
    drawn = path.read_text(encoding="utf-8")
    drawn = drawn[drawn.index("<svg") :]
    for color, own in COLORS.items():
        drawn = drawn.replace(color, own)
    # names of parts are those of the file; several files meet in a page
    prefix = re.sub(r"\W", "", path.stem)
    drawn = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", drawn)
    drawn = drawn.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    kind = "drawing wide broad" if wide else "drawing wide"
    return tag("figure", tag("div", Html(drawn), class_=kind, tabindex=0))


def tiles(content: Iterable[Html]) -> Html:
    """Pictures with their words, as many in a row as fit."""
    return tag("ul", *(tag("li", each) for each in content), class_="tiles")


def picture(image: Images, label: str, side: int = SIDE) -> Html:
    """An image, uint8 RGB [h, w, 3], at most `side` pixels wide or high."""
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    kind, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    if max(height, width) <= side / 2:  # pixels are to be seen as they are
        kind, options = ".png", []
    _, data = cv2.imencode(kind, cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)
    mime = {".jpg": "jpeg", ".png": "png"}[kind]
    source = f"data:image/{mime};base64,{base64.b64encode(data.tobytes()).decode('ascii')}"
    style = "pixels" if kind == ".png" else None
    return tag("img", src=source, alt=label, class_=style)


def page(title: str, lead: Html, sections: Sequence[Section]) -> str:
    """The whole document."""
    links = [tag("a", name, href=f"#{anchor}") for anchor, name, _ in sections]
    head = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        # nothing of the page is fetched, whatever a class is called
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{text(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
    )
    body = joined(
        [
            tag("a", "Skip to the content", href="#content", class_="skip"),
            tag("header", tag("h1", title), lead, tag("nav", *links, aria_label="Sections")),
            tag("main", *(each for _, _, each in sections), id="content"),
        ]
    )
    return f"{head}<body>{body}</body></html>\n"
