"""The folder of a search, made by hand."""

from __future__ import annotations

import csv
from pathlib import Path

from distcls.model_card import SEARCH_TABLE

RATES = (1e-4, 1e-3, 1e-2, 1e-1)
EVIL = "<img src=x onerror=alert(1)>"


def make_search(folder: Path, metric: str = "top1", epochs: int = 4) -> Path:
    """The folder of a search of eight: six finished, one pruned, one failed. The right learning
    rate of one optimiser is the wrong one of the other."""
    folder.mkdir(parents=True)
    rows = []
    for number, (lr, name) in enumerate([(lr, o) for lr in RATES for o in ("adamw", "sgd")], 1):
        place = RATES.index(lr) if name == "sgd" else 3 - RATES.index(lr)
        state = {7: "pruned", 8: "failed"}.get(number, "complete")
        trial = f"{number:03d}-lr={lr:g}-name={name}"
        scores = [round((0.2, 0.3, 0.4, 0.7)[place] + 0.1 * at / epochs, 3) for at in range(epochs)]
        scores = scores[: 2 if state == "pruned" else epochs]
        best = max(scores) if metric == "top1" else min(scores)
        rows.append(
            {"trial": trial, "lr": f"{lr:g}", "optimizer.name": name, "state": state,
             "best_score": "" if state == "failed" else best, "std": "", "best_epoch": epochs,
             "seconds": 1.5, "exit_code": 0, "error": EVIL if state == "failed" else ""}
        )  # fmt: skip
        run = folder / trial
        run.mkdir()
        (run / "config.yaml").write_text(f"lr: {lr:g}\ndata: {folder}/da ta\n")
        lines = [f"{at},{score},1" for at, score in enumerate(scores, 1)]
        (run / "history.csv").write_text(f"epoch,val_{metric},seconds\n" + "\n".join(lines))
    with (folder / SEARCH_TABLE).open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (folder / "search.yaml").write_text(f"pruner: median\nmonitor:\n  metric: {metric}\n")
    return folder
