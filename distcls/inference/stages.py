"""Where the time of a prediction goes: decode, wait, infer, write; measured, and drawn."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from distcls import figures

COLOURS = {
    "decode": figures.BLUE,
    "infer": figures.ORANGE,
    "write": figures.GREEN,
    "wait": figures.GREY,
}


class Stages:
    """Seconds of each stage, added up over the threads; safe to be used by all of them.

    decode: reading, decoding and resizing. infer: the model. write: what whoever takes the answers
    does with them, in its own thread. wait: what is left of the threads' time. A stage that shares
    a core with others takes longer by the clock, so with more threads than cores the seconds say
    where threads were, not what the work would cost alone.
    """

    def __init__(self) -> None:
        self.threads = 0
        """Threads that decode or infer."""
        self.images = 0
        """Images that were answered."""
        self.seconds = 0.0
        """From the first image asked for to the last answer taken, by the clock."""
        self._spent = {"decode": 0.0, "infer": 0.0, "write": 0.0}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            with self._lock:
                self._spent[stage] += spent

    def spent(self, stage: str) -> float:
        """Seconds of a stage; of `wait` those in which the working threads did neither."""
        if stage == "wait":
            busy = self._spent["decode"] + self._spent["infer"]
            return max(0.0, self.threads * self.seconds - busy)
        return self._spent[stage]

    def to_json(self) -> dict[str, float | int]:
        """Plain values, in seconds."""
        stages = {name: round(self.spent(name), 3) for name in ("decode", "wait", "infer", "write")}
        return {
            "images": self.images,
            "threads": self.threads,
            "seconds": round(self.seconds, 3),
            **stages,
        }


def draw(stages: Stages, path: Path, title: str = "") -> None:
    """The picture: a bar for the working threads, one for the thread that writes.

    Raises UsageError without matplotlib.
    """
    figure = figures.new_figure(8, 2.8)
    axes = figure.subplots()
    whole = max(stages.seconds, 1e-9)
    rows = {
        f"{stages.threads} working thread" + "s" * (stages.threads != 1): (
            stages.threads * whole,
            {name: stages.spent(name) for name in ("decode", "infer", "wait")},
        ),
        "writing thread": (
            whole,
            {"write": stages.spent("write"), "wait": max(0.0, whole - stages.spent("write"))},
        ),
    }
    for place, (total, parts) in enumerate(rows.values()):
        left = 0.0
        for name, seconds in parts.items():
            share = 100 * seconds / total if total else 0.0
            axes.barh(place, share, left=left, color=COLOURS[name], edgecolor="white")
            if share >= 6:
                label = f"{name}\n{share:.0f} %, {seconds:.2f} s"
                axes.text(
                    left + share / 2, place, label, ha="center", va="center", color="white", size=8
                )
            left += share
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(
        f"percent of {whole:.2f} s, {stages.images:,} images, {stages.images / whole:,.0f} images/s"
    )
    axes.set_title(title or "where the time goes", fontfamily=figures.fonts(), size=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figures.save(figure, path)
