"""`distcls report` of a search: ranks, curves, what was pruned and mattered; hostile tables."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcls.commands.report import main
from distcls.errors import UsageError
from distcls.model_card import SEARCH_TABLE, best_model
from distcls.report.trials import Trials, influences, ranked, read_trials
from tests.searches import EVIL, RATES, make_search
from tests.test_report import outline


def test_the_page_of_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_search(tmp_path / "lr")
    (folder / "009-lr=9.yaml").write_text("lr: 9\n")
    main([str(folder), "--quiet"])
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    found = outline(folder / "report.html")
    assert found.sections == [
        *("summary", "trials", "curves", "pruned", "failed", "keys", "best", "again"),
    ]
    assert all(source.startswith("#") for source in found.sources)
    assert "Of 8 trials the best is 001" in found.text
    assert "validation top-1 77.5% with lr 0.0001, optimizer.name adamw" in found.text
    assert "1 001 0.0001 adamw" in found.text
    assert "pruned 007 0.1 adamw" in found.text
    assert "007 lr 0.1, optimizer.name adamw 2 22.5% 37.5% 6" in found.text
    assert "median of those that had finished" in found.text
    assert "about 2 of" in found.text
    assert EVIL in found.text
    assert "1 more trial under way" in found.text
    assert "The best lr, 0.0001, is at the lowest end of those tried" in found.text
    assert f"--data '{folder}/da ta' --split test" in found.text


def test_a_score_that_is_best_at_its_least(tmp_path: Path) -> None:
    folder = make_search(tmp_path / "lr", "loss")
    first = read_trials(folder).trials[0]
    assert (first.number, first.score) == ("002", pytest.approx(0.2))
    # a metric of somebody's own is not imported to learn which way is better
    (folder / "search.yaml").write_text("monitor:\n  metric: nowhere:loss\n")
    assert read_trials(folder).greatest


def test_what_mattered_is_told_from_chance(tmp_path: Path) -> None:
    search = read_trials(make_search(tmp_path / "lr"))
    random = np.random.default_rng(0)
    trials = []
    for number in range(60):
        lr, noise = random.choice(RATES[1:]), str(random.integers(2))
        name = "adamw" if random.random() < 0.5 else "sgd"
        score = math.log10(lr) * (1 if name == "sgd" else -1) + random.normal(0, 0.1)
        values = {"lr": str(lr), "optimizer.name": name, "noise": noise}
        trials.append(_trial(search, number, score, values))
    found = influences(_search(search, trials))
    by = {each.keys: each for each in found}
    assert found[0].keys == ("lr", "optimizer.name")
    assert found[0].share > 0.8
    assert found[0].p < 0.01
    assert by["noise",].share < 0.1
    assert by["noise",].p > 0.05
    assert not influences(_search(search, trials[:5]))


def _trial(search: Trials, number: int, score: float, values: dict[str, str]) -> Any:
    return dataclasses.replace(search.trials[0], name=f"{number:03d}", score=score, values=values)


def _search(search: Trials, trials: list[Any]) -> Trials:
    keys = tuple(trials[0].values)
    return dataclasses.replace(search, keys=keys, trials=tuple(ranked(trials, True)))


def test_folds_and_numbers_that_are_none(tmp_path: Path) -> None:
    folder = make_search(tmp_path / "lr")
    search = read_trials(folder)
    run = folder / search.trials[0].name
    for fold, shift in ((1, 0.0), (2, 0.2), (10, 0.4)):
        (run / f"fold{fold}").mkdir()
        text = f"epoch,val_top1\n1,{0.1 + shift}\n2,nan\n3,{0.3 + shift}\n"
        (run / f"fold{fold}" / "history.csv").write_text(text)
    (run / "history.csv").unlink()
    (run / "config.yaml").rename(run / "fold1" / "config.yaml")
    best = next(trial for trial in read_trials(folder).trials if trial.name == run.name)
    assert best.curve == pytest.approx({1: 0.3, 3: 0.5})
    table = folder / SEARCH_TABLE
    table.write_text(table.read_text().replace("0.475", "nan").replace("0.775", "1e999"))
    main([str(folder), "--quiet"])
    assert "best" in outline(folder / "report.html").sections


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("complete", "won", "row 1.state is 'won', expected one of complete, pruned, failed"),
        ("001-lr=0.0001-name=adamw", "../../etc", "row 1.trial is '../../etc'"),
        ("1.5", "-1", "row 1.seconds is -1.0, expected a number"),
        (",0.0001", "," + "x" * 2000, "row 1.values.lr is"),
        ("trial,", "run,", "its first line is"),
        (",lr,", ",optimizer.name,", "its keys has 'optimizer.name' twice"),
        ("0.775", "high", "could not convert string to float: 'high'"),
        ("1.5", '1.5,"', "unexpected end of data"),
        ("1.5", "1.5,2", "has 11 values, expected 10"),
        ("002-lr=0.0001-name=sgd", "001-lr=0.0001-name=adamw", "its trials has '001"),
    ],
)
def test_a_damaged_table_is_one_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    folder = make_search(tmp_path / "lr")
    table = folder / SEARCH_TABLE
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        main([str(folder), "--quiet"])
    assert str(caught.value).startswith(f"{table}: not the table of a search: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_what_only_a_run_has_is_refused(tmp_path: Path) -> None:
    one, two = make_search(tmp_path / "one"), make_search(tmp_path / "two")
    with pytest.raises(UsageError, match=r"runs: .*one is a search; report it alone"):
        main([str(one), str(two)])
    with pytest.raises(UsageError, match=r"split: .*one is a search, of which the validation"):
        main([str(one), "--split", "test"])
    with pytest.raises(UsageError, match=r"model: .*one has the trials of a search; name one"):
        best_model(one)
