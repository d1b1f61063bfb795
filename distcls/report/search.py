"""The page about a search: its trials by rank, their curves, what was pruned, what mattered."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distcls import __version__, log, plotting
from distcls.evaluation.compare import p_text
from distcls.launch.search import SETTINGS
from distcls.page import (
    MOST_ROWS,
    Html,
    Section,
    bar,
    drawing,
    facts,
    folded,
    page,
    section,
    table,
    tag,
)
from distcls.report.runs import CONFIG, read_config
from distcls.report.trials import (
    LEVELS,
    Trial,
    Trials,
    at_an_end,
    influences,
    named,
    numbers,
    read_trials,
)
from distcls.report.words import NONE, SHARES, in_words, setting, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORED = 5
"""Trials that have a colour of their own among the curves."""
MOST_CURVES, MOST_PANELS = 60, 8
MOST_SHOWN = 1000
"""Rows of the table."""
FAR = 3.0
"""Interquartile ranges beyond which a score is left outside of the frame of a figure."""
PRUNERS = {
    "median": "a trial is stopped when its best score so far is below the median of those that "
    "had finished, at the same epoch",
    "hyperband": "a trial is stopped unless it is among the best third at epochs 1, 3, 9 and so on",
}


def search_report(folder: Path, scratch: Path) -> str:
    """The page about the search in a folder. Raises UsageError for a damaged table."""
    search = read_trials(folder)
    sections = [
        _summary(search),
        _trials(search),
        _curves(search, scratch),
        _pruned(search),
        _failed(search),
        _keys(search, scratch),
        _best(search),
        _again(search),
    ]
    best = search.of_state("complete")[:1]
    lead = tag("p", "No trial has finished.")
    if best:
        lead = tag(
            "p",
            f"Of {log.counted(len(search.trials), 'trial')} the best is {best[0].number}: "
            f"validation {plotting.metric_title(search.metric)} ",
            tag("b", _score(search, best[0])),
            f" with {named(best[0])}.",
        )
    title = f"Search: {folder.resolve().name}"
    return page(title, lead, [each for each in sections if each is not None])


def place_in_search(search: Trials, trial: Trial) -> str:
    """What the report of one of its trials says of the search."""
    finished = search.of_state("complete")
    where = f"This is trial {trial.number} of the search {search.folder}, "
    if trial.state != "complete":
        where += f"which was {trial.state}"
    else:
        where += f"number {finished.index(trial) + 1} of {len(finished)} that finished"
    if finished and trial is not finished[0]:
        return f"{where}; the best is {finished[0].name}. distcls report {search.folder} has all."
    return f"{where}. distcls report {search.folder} has all."


def _score(search: Trials, trial: Trial) -> str:
    return in_words(search.metric, trial.score)


def _summary(search: Trials) -> Section:
    states = {state: len(search.of_state(state)) for state in ("complete", "pruned", "failed")}
    best = search.of_state("complete")[:1]
    cells = [
        (_score(search, best[0]) if best else NONE, f"best {plotting.metric_title(search.metric)}"),
        (f"{states['complete']:,}", "finished"),
        (f"{states['pruned']:,}", "pruned"),
        (f"{states['failed']:,}", "failed"),
        (f"{sum(trial.epochs for trial in search.trials):,}", "epochs trained"),
    ]
    seconds = sum(trial.seconds or 0 for trial in search.trials)
    cells.append((log.duration(seconds), "training, all trials"))
    headline = tag("ul", *(tag("li", tag("b", v), tag("span", n)) for v, n in cells),
                   class_="headline")  # fmt: skip
    notes = tag("ul", *(tag("li", each) for each in _notes(search)), class_="notes")
    names = ("sampler", "pruner", "folds", "jobs", "seed", "data")
    known = {name: search.settings.get(name) for name in names}
    pairs = [("Values", "; ".join(_space(search)) or None), *known.items()]
    return section(
        *("summary", "Summary", headline, notes),
        facts((name, value) for name, value in pairs if value is not None),
    )


def _space(search: Trials) -> list[str]:
    """What was searched, as it was given."""
    given = [search.settings.get(name) for name in ("grid", "range")]
    return [str(each) for part in given if isinstance(part, list) for each in part]


def _notes(search: Trials) -> list[str]:
    """What to look at first."""
    finished, notes = search.of_state("complete"), []
    if finished:
        notes.append(
            f"As the best of {len(search.scored)} on the same validation images it looks better "
            "than it is: measure it on the test split, with the commands below."
        )
    if len(finished) > 1:
        first, second = finished[:2]
        apart = abs(first.score - second.score)
        notes.append(
            f"The second, {second.number}, has {_score(search, second)}"
            f"{'' if apart else ', which is the same'} ({named(second)}). Trials differ by chance, "
            "too: distcls compare tells whether two can be told apart."
        )
    for key in search.keys:
        if end := at_an_end(search, key):
            value = finished[0].values[key]
            notes.append(
                f"The best {key}, {short(value)}, is at the {end} end of those tried: a search "
                f"{'below' if end == 'lowest' else 'above'} it may find better ones."
            )
    if search.unfinished:
        notes.append(
            f"{log.counted(search.unfinished, 'more trial')} under way, or stopped: this page has "
            "none of it." if search.unfinished == 1 else
            f"{search.unfinished:,} more trials are under way, or stopped: this page has none of "
            "them."
        )  # fmt: skip
    return notes


def _trials(search: Trials) -> Section:
    finished = {id(trial): at for at, trial in enumerate(search.of_state("complete"), 1)}
    scores = [trial.score for trial in search.scored]
    low, high = (min(scores), max(scores)) if scores else (0.0, 0.0)
    folds = any(trial.std is not None for trial in search.trials)
    rows = []
    for trial in search.trials[:MOST_SHOWN]:
        share = (trial.score - low) / (high - low) if high > low else 1.0
        share = share if search.greatest else 1 - share
        cells: list[object] = [
            finished.get(id(trial)) or tag("span", trial.state, class_=_style(trial)),
            trial.number,
            *(short(trial.values[key]) for key in search.keys),
            bar(share) if math.isfinite(share) else None,
            _score(search, trial),
        ]
        cells += [f"{trial.std:.4f}" if trial.std is not None else None] if folds else []
        seconds = None if trial.seconds is None else f"{trial.seconds:,.1f}"
        rows.append([*cells, trial.best_epoch, trial.epochs or None, seconds])
    score = plotting.metric_title(search.metric)
    head = ["rank", "trial", *search.keys, "", score, *(["deviation"] if folds else [])]
    head += ["best epoch", "epochs", "seconds"]
    texts = 3 + len(search.keys)
    content: list[Html] = [table(head, rows[:MOST_ROWS], numbers=texts)]
    if len(rows) > MOST_ROWS:
        more = table(head, rows[MOST_ROWS:], numbers=texts)
        content.append(folded(f"{len(rows) - MOST_ROWS:,} more", more))
    if len(search.trials) > MOST_SHOWN:
        note = f"search.csv has all {len(search.trials):,}."
        content.append(tag("p", note, class_="fine"))
    return section("trials", "Trials", *content)


def _style(trial: Trial) -> str:
    return "bad" if trial.state == "failed" else "warning"


def _curves(search: Trials, scratch: Path) -> Section | None:
    if not any(trial.curve for trial in search.trials):
        return None
    path = scratch / "trials.svg"
    _draw_curves(search, path)
    title = plotting.metric_title(search.metric)
    words = "Each trial is a line; pruned ones are dashed and end with a cross where they stopped."
    if len(search.trials) > MOST_CURVES:
        words += f" At most {MOST_CURVES} finished ones are drawn, and as many pruned ones."
    label = f"Validation {title} of each trial by epoch"
    return section("curves", "Curves", tag("p", words), drawing(path, label, wide=True))


def _draw_curves(search: Trials, path: Path) -> None:
    figure = plotting.new_figure(10, 4.5)
    axes = figure.add_subplot()
    colors = (plotting.GREEN, plotting.BLUE, plotting.ORANGE, "#7c3aed", "#0891b2")
    best = search.of_state("complete")[:COLORED]
    states = (search.of_state(state)[:MOST_CURVES] for state in ("complete", "pruned", "failed"))
    others = [trial for trial in itertools.chain(*states) if trial not in best]
    for rank, (trial, color) in enumerate(zip(best, colors, strict=False), 1):
        width = 2.2 if rank == 1 else 1.4
        style = {"color": color, "linewidth": width, "zorder": 4 - 0.1 * rank}
        _draw_curve(axes, trial, label=f"{rank}: trial {trial.number}", **style)
    said = {"complete": "other finished"}
    for trial in others:
        label = said.setdefault(trial.state, trial.state)
        _draw_curve(axes, trial, label=label, color=plotting.GREY, linewidth=1, alpha=0.85)
        said[trial.state] = ""  # one line of the legend stands for all
    axes.set_ylabel(f"validation {plotting.metric_title(search.metric)}")
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    _frame(axes, search, [score for trial in search.trials for score in trial.curve.values()])
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    plotting.save(figure, path)


def _draw_curve(axes: Axes, trial: Trial, **style: Any) -> None:
    """Ended by a cross where it was stopped."""
    curve, pruned = trial.curve, trial.state == "pruned"
    if not curve:
        return
    epochs, scores = list(curve), list(curve.values())
    style["label"] = style["label"] or None
    marker = "o" if len(curve) == 1 and not pruned else ""
    dashed = "--" if pruned else "-"
    axes.plot(epochs, scores, linestyle=dashed, marker=marker, markersize=3.5, **style)
    if pruned:
        axes.plot(epochs[-1:], scores[-1:], "x", color=style["color"], markersize=6)


def _frame(axes: Axes, search: Trials, scores: Sequence[float]) -> None:
    """Grid and limits; a trial that diverged leaves the frame, or the rest would be one line."""
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if search.metric in SHARES:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.{plotting.digits(axes)}%}")
    quarter, rest = np.quantile(scores, (0.25, 0.75))
    reach = FAR * (rest - quarter)
    inside = [score for score in scores if quarter - reach <= score <= rest + reach]
    if len(inside) < len(scores) and reach > 0:
        edge = 0.05 * (max(inside) - min(inside))
        axes.set_ylim(min(inside) - edge, max(inside) + edge)


def _pruned(search: Trials) -> Section | None:
    """Which trials were stopped when, and how those stood that were not."""
    stopped, finished = search.of_state("pruned"), search.of_state("complete")
    if not stopped:
        return None
    best = max if search.greatest else min
    rows = []
    for trial in stopped[:MOST_SHOWN]:
        last = max(trial.folds[-1], default=0) if trial.folds else 0
        when = f"{last}" if len(trial.folds) < 2 else f"{last} of fold {len(trial.folds)}"
        others = [each.curve[last] for each in finished if last in each.curve]
        median = f"{in_words(search.metric, float(np.median(others)))}" if others else None
        own = best(trial.curve.values()) if trial.curve else math.nan
        cells = [when, in_words(search.metric, own), median, f"{len(others):,}"]
        rows.append([trial.number, named(trial), *cells])
    rule = PRUNERS.get(str(search.settings.get("pruner")), "")
    words = f"By the {search.settings.get('pruner')} pruner: {rule}." if rule else ""
    spared = _spared(search)
    words += f" It saved about {spared:,} of {spared + _epochs(search):,} epochs." if spared else ""
    head = ["trial", "values", "stopped after epoch", "its best", "median of finished there", "of"]
    listed = table(head, rows, numbers=2)
    content = folded(f"{len(rows):,} trials", listed) if len(rows) > MOST_ROWS else listed
    return section("pruned", "Pruned", tag("p", words.strip()), content)


def _epochs(search: Trials) -> int:
    return sum(trial.epochs for trial in search.trials)


def _spared(search: Trials) -> int:
    """Epochs that pruned trials would have taken, were they as long as the finished ones."""
    whole = [trial.epochs for trial in search.of_state("complete")]
    usual = int(np.median(whole)) if whole else 0
    return sum(max(0, usual - trial.epochs) for trial in search.of_state("pruned"))


def _failed(search: Trials) -> Section | None:
    rows = [
        [trial.number, named(trial), plotting.shorten(trial.error, 300)]
        for trial in search.of_state("failed")[:MOST_SHOWN]
    ]
    if not rows:
        return None
    return section("failed", "Failed", table(["trial", "values", "why"], rows, numbers=3))


def _keys(search: Trials, scratch: Path) -> Section | None:
    if not search.scored or not search.keys:
        return None
    found = influences(search)
    order = list(dict.fromkeys([*(key for each in found for key in each.keys), *search.keys]))
    path = scratch / "keys.svg"
    _draw_keys(search, order[:MOST_PANELS], path)
    content: list[Html] = [drawing(path, "Score of each trial by the value of each key", wide=True)]
    if found:
        rows = [
            [" with ".join(each.keys), bar(each.share), f"{each.share:.0%}", p_text(each.p)]
            for each in found
        ]
        content.append(table(["key", "", "share", "p"], rows, numbers=2))
        note = (
            "How much of the order of the trials goes with each key (the variance of the ranks "
            "between its values, adjusted for their number; numbers in three groups), or with two "
            "that say more together, and how often chance gives as much. A sampler that draws near "
            "good trials makes it a rough guide."
        )
    else:
        note = "These trials are too few to tell which keys matter."
    content.append(tag("p", note, class_="fine"))
    return section("keys", "What mattered", *content)


def _draw_keys(search: Trials, keys: Sequence[str], path: Path) -> None:
    columns = min(len(keys), 4)
    rows = math.ceil(len(keys) / columns)
    turned = any(_turned(_levels(search.scored, key)) for key in keys)
    figure = plotting.new_figure(max(5.0, 3.3 * columns), (3.2 + turned) * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    trials = search.scored
    for axes, key in itertools.zip_longest(grid.flat, keys):
        if key is None:
            axes.axis("off")
            continue
        _draw_key(axes, search, trials, key)
        _frame(axes, search, [trial.score for trial in trials])
    for axes in grid[:, 0]:
        axes.set_ylabel(plotting.metric_title(search.metric))
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, loc="outside upper center", ncols=3)
    plotting.save(figure, path)


def _levels(trials: Sequence[Trial], key: str) -> list[str]:
    """The values of a key that stand side by side; empty for many numbers."""
    known, found = numbers(trials, key), sorted({trial.values[key] for trial in trials})
    if known is None:
        return found
    return sorted(found, key=float) if len(found) <= LEVELS else []


def _turned(levels: Sequence[str]) -> bool:
    """Whether their names would not fit beside each other."""
    return sum(min(len(level), 16) for level in levels) > 22


def _draw_key(axes: Axes, search: Trials, trials: Sequence[Trial], key: str) -> None:
    """One point a trial; values that are no numbers, or few, stand side by side."""
    known, levels = numbers(trials, key) or [], _levels(trials, key)
    if levels:
        random = np.random.default_rng(0)
        places = [levels.index(trial.values[key]) for trial in trials]
        across = (np.array(places) + random.uniform(-0.12, 0.12, len(places))).tolist()
        names = [plotting.shorten(level, 16) for level in levels]
        turn = 90 if _turned(levels) else 0
        axes.set_xticks(range(len(names)), names, rotation=turn, parse_math=False)
        axes.set_xlim(-0.6, len(levels) - 0.4)
    else:
        across = known
        if min(known) > 0 and max(known) / min(known) > 20:
            axes.set_xscale("log")
    points = dict(zip(map(id, trials), across, strict=True))
    groups: Mapping[str, tuple[list[Trial], dict[str, Any]]] = {
        "finished": (
            [trial for trial in trials if trial.state == "complete"],
            {"c": plotting.BLUE, "s": 26},
        ),
        "pruned": (
            [trial for trial in trials if trial.state == "pruned"],
            {"facecolors": "none", "edgecolors": plotting.ORANGE, "s": 26},
        ),
        "the best": (
            search.of_state("complete")[:1],
            {"c": plotting.GREEN, "s": 110, "marker": "*"},
        ),
    }
    for label, (group, style) in groups.items():
        shown = [trial for trial in group if id(trial) in points]
        if shown:
            values = [points[id(trial)] for trial in shown]
            axes.scatter(values, [trial.score for trial in shown], label=label, **style)
    axes.set_xlabel(plotting.shorten(key, 40), parse_math=False)


def _best(search: Trials) -> Section | None:
    best = search.of_state("complete")[:1]
    if not best:
        return None
    runs = [run for run in _runs(search, best[0]) if (run / CONFIG).is_file()]
    pairs = [(key, short(value)) for key, value in best[0].values.items()]
    content = [facts([("Folder", str(search.folder / best[0].name)), *pairs])]
    config = read_config(runs[0] / CONFIG) if runs else {}
    if config:
        rows = [[key, setting(value)] for key, value in config.items()]
        whole = table(["key", "value"], rows, numbers=2)
        content.append(folded(f"All {len(rows)} settings", whole))
    return section("best", "The best trial", *content)


def _runs(search: Trials, trial: Trial) -> list[Path]:
    """Its run directory, or those of its folds."""
    run = search.folder / trial.name
    return [run] if (run / CONFIG).is_file() else sorted(run.glob("fold*"))


def _again(search: Trials) -> Section:
    folder, lines = shlex.quote(str(search.folder)), []
    for trial in search.of_state("complete")[:1]:
        for run in _runs(search, trial)[:1]:
            own = shlex.quote(str(run))
            config = shlex.quote(str(run / CONFIG))
            data = shlex.quote(str(read_config(run / CONFIG).get("data") or "DATA"))
            lines += [
                f"distcls report {own}",
                f"distcls evaluate --model {own} --data {data} --split test",
                f"distcls train --config {config} --out runs/best --resume none --json false",
            ]
    if (settings := search.folder / SETTINGS).is_file():
        lines.append(
            f"python -m distcls.launch.search --config {shlex.quote(str(settings))} --resume auto"
        )
    lines.append(f"distcls report {folder} --overwrite")
    return section(
        *("again", "Do it again", tag("pre", "\n".join(lines))),
        tag("p", f"This page was made with distcls {__version__}.", class_="fine"),
    )
