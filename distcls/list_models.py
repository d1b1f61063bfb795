"""`distcls models`: the networks that can be trained, with their size and cost."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from distcls.config import parse, positional
from distcls.door import run

ABOUT = "List networks by name with their parameters, multiply-accumulates and input size."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    """What `distcls models` can be told."""

    pattern: str | None = positional(None)
    """Names to list: a glob such as 'timm:*vit*', or a part of the name; unset, the best known."""
    json: bool = False
    """Print one JSON object on standard output."""


def main(arguments: Sequence[str]) -> None:
    """Parse, look up, print."""
    options = parse(ModelsOptions, arguments, prog="distcls models", about=ABOUT)
    from distcls.models.listing import HEADER, describe  # torch loads for a right command only
    from distcls.models.names import matching

    names = matching(options.pattern)
    if options.json:
        print(json.dumps({"models": [describe(name).to_json() for name in names]}))
        return
    print(HEADER)
    for name in names:
        print(describe(name).line(), flush=True)


if __name__ == "__main__":
    run(main)
