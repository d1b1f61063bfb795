"""`distcls audit`: parse, look, print."""

from __future__ import annotations

from collections.abc import Sequence

from distcls import log
from distcls.audit.audit import AuditOptions, Findings, audit
from distcls.audit.findings import counted
from distcls.cli import run
from distcls.config import Command

COMMAND = Command(
    options=AuditOptions,
    prog="distcls audit",
    about="Look at a dataset before it is trained on: copies, broken files, odd images, labels.",
    examples=(
        "distcls audit photos/ --out audit",
        "distcls audit photos/ --fix repaired.csv",
        "distcls audit photos/ --label-errors --out audit",
        "distcls audit datasets/photos --model runs/photos --strict",
    ),
    groups={
        "essential options": ("data", "out", "overwrite", "model", "fix", "strict"),
        "label errors": ("label_errors", "folds", "recipe", "seed"),
        "reading": (
            *("format", "splits", "path_column", "label_column", "label_columns"),
            *("labels_column", "root", "background"),
        ),
    },
)


def main(arguments: Sequence[str]) -> None:
    """Parse, look, print. Raises Findings for errors with --strict."""
    options = COMMAND.parse(arguments)
    log.set_quiet(options.quiet)
    result = audit(options)
    if options.json:
        log.print_json(result.to_json())
    else:
        print(result.to_text())
    if result.failure is not None:
        raise result.failure
    errors = sum(counted(result.findings)["error"].values())
    if options.strict and errors:
        raise Findings(f"{options.data}: {log.counted(errors, 'error')} (--strict)")


if __name__ == "__main__":
    run(main)
