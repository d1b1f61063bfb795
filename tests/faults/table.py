"""The table of faults: what each row is called, and its verdict at the end of a test run.

A test says which rows it causes, `@pytest.mark.row(1, 4)`; the table counts tests, parameters too.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

ROWS = {
    1: "kill -9 at a random step",
    2: "kill -9 while a state is written",
    3: "one process of several dies",
    4: "resumed with other processes",
    5: "two jobs on one host",
    6: "early stop decided on one rank",
    7: "disk full",
    8: "output folder read-only",
    9: "damaged state",
    10: "SIGTERM, SIGINT, SIGUSR1",
    11: "second SIGTERM during the save",
    12: "NaN on one rank",
    13: "GPU out of memory",
    14: "data worker dies",
    15: "stalled storage",
    16: "corrupt image",
    17: "decompression bomb",
    18: "not what its ending says",
    19: "malicious pickle",
    20: "ONNX data outside its folder",
    21: "clock jumps by an hour",
    22: "malformed request",
    23: "oversized or compressed body",
    24: "slow or silent client",
    25: "more than can be served",
    26: "client hangs up",
    27: "new model under load",
    28: "bad new model",
    29: "SIGTERM under load",
    30: "compute process killed",
    31: "one bad item in a batch",
    32: "batch prediction killed",
    33: "input changed before the rerun",
    34: "labels and classes that cannot be",
    35: "strange file names",
    36: "hostile picture or archive",
    37: "machine fails while an image is read",
    38: "too many bad images",
    39: "picture with a hole",
    40: "pipe, device or read without end",
    41: "malformed line of a list",
    42: "answer of a server without end",
    43: "config that is none",
    44: "output over an input",
    45: "empty shell variable",
    46: "flipped bit in what is read back",
    47: "forged file that is read back",
    48: "jobs that meet",
}
PROPERTY = "fault row"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hand each test's rows on to its report, which may come from another process."""
    for item in items:
        rows = {row for mark in item.iter_markers("row") for row in mark.args}
        item.user_properties += [(PROPERTY, row) for row in sorted(rows)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the rows that were tested."""
    outcomes: dict[int, list[str]] = defaultdict(list)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            for name, row in report.user_properties:
                if name == PROPERTY:
                    outcomes[row].append(_verdict(outcome, report))
    if not outcomes:
        return
    terminalreporter.section("faults")
    for row, verdicts in sorted(outcomes.items()):
        line = f"{row:>3}  {ROWS[row]:<34} {len(verdicts):>3}  {_worst(verdicts)}"
        terminalreporter.write_line(line)


def _verdict(outcome: str, report: pytest.TestReport) -> str:
    if outcome != "skipped":
        return "passed" if outcome == "passed" else "failed"
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return f"skipped: {reason.removeprefix('Skipped: ')}"


def _worst(verdicts: list[str]) -> str:
    """Failed if any test has, passed if any did; else why all were skipped."""
    for verdict in ("failed", "passed"):
        if verdict in verdicts:
            return verdict
    return verdicts[0]
