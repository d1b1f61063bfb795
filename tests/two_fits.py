"""A script of a user's that trains twice and evaluates, on as many processes as are started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import distcls


def main(data: Path, out: Path) -> None:
    options: dict[str, Any] = {
        "model": "simple_cnn",
        "epochs": 1,
        "limit": 64,
        "batch_size": 16,
        "quiet": True,
    }
    for name in ("one", "two"):
        result = distcls.fit(data=data, out=out / name, **options)
        best = result.out / "best.pth"
        evaluation = distcls.evaluate_model(best, data, split="val", quiet=True)
        print(result.best_score, evaluation.top1, evaluation.count, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
