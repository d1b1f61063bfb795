"""What a run writes for people and plots; only the main process holds one."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

from distcls.config import dump_yaml
from distcls.errors import UsageError
from distcls.evaluation.plots import curves
from distcls.files import require_writable, write_text
from distcls.training.config import TrainConfig
from distcls.training.trackers import Track

CONFIG, METRICS, HISTORY, CURVES = "config.yaml", "metrics.jsonl", "history.csv", "curves.png"
PLACES = ("step", "epoch")
"""What says where a figure belongs and is none itself."""
CURVES_SHARE = 0.005
"""Share of the time that drawing may take: one takes 0.2 to 0.5 s, some epochs little more."""
BEST, LAST = "best.pth", "last"


def require_free(out: Path, resume: str) -> None:
    """Raise UsageError if `out` holds a run that this one would overwrite."""
    if resume == "none" and (out / CONFIG).exists():
        raise UsageError(
            f"{out} holds a run already; choose another --out, or continue it with --resume auto"
        )


class Records:
    """config.yaml, metrics.jsonl, history.csv and curves.png of a run directory."""

    def __init__(self, config: TrainConfig, step: int, track: Track | None = None) -> None:
        """Open the records of a run that has finished `step` steps; later lines are dropped.

        Numbers of later lines also go to `track`.
        """
        self.folder = config.out
        self._track = track
        self._monitor = config.monitor.metric
        self._undrawn: list[dict[str, float]] = []
        self._next_drawing = 0.0
        require_writable(self.folder)
        write_text(self.folder / CONFIG, dump_yaml(config))
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8") if step and path.exists() else ""
        # a kill or a full disk may have left half of the last line
        whole = [line for line in lines.splitlines(keepends=True) if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))
        self._metrics = path.open("a", encoding="utf-8")

    def line(self, kind: str, **values: Any) -> None:
        """Append one JSON line to metrics.jsonl; it carries `kind` (step or epoch) and `step`."""
        self._metrics.write(json.dumps({"kind": kind, **values}) + "\n")
        self._metrics.flush()
        if self._track is not None:
            numbers = {f"{kind}/{name}": v for name, v in values.items() if name not in PLACES}
            self._track(numbers, values["step"])

    def epochs(self, history: list[dict[str, float]]) -> None:
        """Rewrite history.csv, and now and then curves.png, from all epochs so far."""
        table = io.StringIO()
        writer = csv.DictWriter(table, list(history[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.folder / HISTORY, table.getvalue())
        self._undrawn = history
        if time.monotonic() >= self._next_drawing:
            self._draw()

    def close(self) -> None:
        """Draw what is not drawn yet and close metrics.jsonl."""
        if self._undrawn:
            self._draw()
        self._metrics.close()

    def _draw(self) -> None:
        began = time.monotonic()
        curves(self._undrawn, self.folder / CURVES, self._monitor)
        ended = time.monotonic()
        self._undrawn, self._next_drawing = [], ended + (ended - began) / CURVES_SHARE
