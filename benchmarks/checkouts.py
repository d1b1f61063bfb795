"""`python -m benchmarks.checkouts OTHER`: this checkout against another one, in alternation.

Each contestant is a separate process that runs the code of one checkout, with that checkout's
own benchmark modules: the training step at 32 and 224 pixels, a whole epoch with its records and
states (`safety`), and batch prediction on the CPU. Both get the same data. So a refactoring
can be shown to cost no speed; the other checkout may be of any version that has these benchmarks.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.common import Contestant, alternate, finish, ratio, table
from benchmarks.photographs import model_for, photographs
from benchmarks.train_step import SETTINGS, write_photographs
from distcls.data.prepare import PrepareOptions, prepare

SERVE = """
import sys
from pathlib import Path
answers = sys.stdout
sys.stdout = sys.stderr
{make}
for _ in sys.stdin:
    print(run(), file=answers, flush=True)
"""
"""The program of a contestant's process: one round per line on its standard input."""

HERE, THERE = "this checkout", "the other"


@contextlib.contextmanager
def contestant(checkout: Path, make: str) -> Iterator[Contestant]:
    """A process in `checkout`; `make` is Python that leaves a function `run`, a round's rate."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE.format(make=make)],
        cwd=checkout,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    asked, answered = process.stdin, process.stdout

    def run() -> float:
        print("round", file=asked, flush=True)
        return float(answered.readline())  # ValueError once the process is gone

    try:
        yield run
    finally:
        asked.close()
        process.wait(timeout=60)


def makers(scratch: Path, pictures: Path | None, count: int) -> dict[str, str]:
    """The code that a contestant of each comparison runs; {out} is a folder of its own."""
    found = {}
    for side, (batch, steps) in SETTINGS.items():
        data = scratch / f"prepared{side}"
        write_photographs(scratch / f"images{side}", side, 2 * batch * steps)
        prepare(PrepareOptions(source=str(scratch / f"images{side}"), out=data, quiet=True))
        found[f"train_step {side}"] = (
            "from benchmarks.train_step import ours\n"
            f"run = ours(Path({str(data)!r}), {side}, {batch}, {steps})"
        )
    digits = scratch / "digits"
    prepare(PrepareOptions(source="digits", out=digits, quiet=True))
    found["safety"] = (
        "from benchmarks.safety import recipe, safe\n"
        f"config = recipe(Path({str(digits)!r}), Path('{{out}}'), 'mobilenet_v3_small', 128, 25)\n"
        "run = safe(config, 50)"
    )
    if pictures is not None:
        folder = photographs(pictures, count)
        found["predict cpu"] = (
            "from benchmarks.predict_ways import ours\n"
            f"run = ours(Path({str(folder)!r}), Path({str(model_for(folder))!r}), 'cpu')"
        )
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--pictures", type=Path, help="large photographs, for batch prediction")
    parser.add_argument("--count", type=int, default=500, help="photographs to cut out of them")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count")
    parser.add_argument("--only", nargs="+", help="comparisons, by their names in the output")
    given = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        comparisons = makers(scratch, given.pictures, given.count)
        for name, make in comparisons.items():
            if given.only is not None and name not in given.only:
                continue
            print(f"{name}: {given.rounds} rounds", file=sys.stderr, flush=True)
            roots = {HERE: Path(__file__).parent.parent, THERE: given.other.resolve()}
            with contextlib.ExitStack() as stack:
                runs = {
                    who: stack.enter_context(
                        contestant(root, make.replace("{out}", str(scratch / f"run{at}")))
                    )
                    for at, (who, root) in enumerate(roots.items())
                }
                rates = alternate(runs, given.rounds)
            print(name)
            print(table(rates, THERE), end="\n\n", flush=True)
            figures[name] = round(ratio(rates, HERE, THERE), 3)
    finish("checkouts", ratios=figures, rounds=given.rounds)


if __name__ == "__main__":
    main()
