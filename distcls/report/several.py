"""The page that sets several runs side by side, on the same images."""

from __future__ import annotations

import shlex
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distcls import log, plotting
from distcls.data.dataset import Dataset
from distcls.evaluation.compare import Comparison, compare_results, p_text
from distcls.evaluation.outputs import Outputs
from distcls.page import (
    MOST_ROWS,
    Html,
    Section,
    bar,
    drawing,
    facts,
    folded,
    joined,
    page,
    picture,
    section,
    table,
    tag,
    tiles,
)
from distcls.report.options import ReportOptions
from distcls.report.runs import Run, costly, images_of
from distcls.report.words import file_size, in_words, of_split, setting, short

MOST_IMAGES = 12
"""Images that only one of two models gets right, of each."""
FIGURES = ("top1", "exact", "loss", "macro_f1", "balanced_accuracy", "auroc", "ece", "brier")
UNTOLD = frozenset(("out", "resume", "quiet", "json"))
"""Settings in which runs differ without being different."""


def several_runs(
    runs: Sequence[Run], dataset: Dataset, split: str, options: ReportOptions, scratch: Path
) -> str:
    """The page about runs A, B, ... against the first."""
    letters = string.ascii_uppercase[: len(runs)]
    names = [run.name for run in runs]
    compared = compare_results(names, [run.result for run in runs])
    sections = [
        _verdict(runs, compared, letters),
        _figures(runs, compared, letters),
        _classes(runs, letters),
        _curves(runs, letters, scratch),
        _settings(runs, letters),
        _images(runs, dataset, split, letters),
        _again(runs, dataset, options, letters),
    ]
    lead = tag("p", f"{compared.verdict(1)}, on {compared.images:,} {of_split(split)} images.")
    title = "Report: " + ", ".join(f"{a} {name}" for a, name in zip(letters, names, strict=True))
    return page(plotting.shorten(title, 200), lead, [each for each in sections if each is not None])


def _verdict(runs: Sequence[Run], compared: Comparison, letters: str) -> Section:
    lines = [tag("li", compared.verdict(place)) for place in range(1, len(runs))]
    lines += [
        tag("li", f"{letter} looks better here than it is: {seen}.", class_="warning")
        for letter, seen in zip(letters, map(_seen, compared.trained_on), strict=True)
        if seen
    ]
    cells = [
        tag(
            "li",
            tag("b", in_words(compared.figure, run.result.figures[compared.figure])),
            tag("span", f"{letter} {plotting.shorten(run.name, 40)}"),
            *_also(run, compared),
        )
        for letter, run in zip(letters, runs, strict=True)
    ]
    note = (
        "This is about these models. Another seed gives other models: distcls compare with several "
        "runs of each recipe tells whether the recipe is better."
    )
    return section(
        *("verdict", "Verdict", tag("ul", *cells, class_="headline")),
        *(tag("ul", *lines, class_="notes"), tag("p", note, class_="fine")),
    )


def _also(run: Run, compared: Comparison) -> list[Html]:
    """Of several outputs which of the figures is which."""
    if not compared.outputs:
        return []
    top1 = in_words("top1", run.result.top1)
    return [
        tag(
            "span",
            f"all {compared.outputs} right (exact); {top1} of the {compared.outputs} (top-1)",
        )
    ]


def _seen(count: int) -> str:
    """What is said of a run that was trained on some of the images."""
    images = log.counted(count, "image")
    return f"{images} of these were in its own training split" if count else ""


def _figures(runs: Sequence[Run], compared: Comparison, letters: str) -> Section:
    known = [name for name in FIGURES if all(name in run.result.figures for run in runs)]
    rows = [
        [plotting.metric_title(name), *(in_words(name, run.result.figures[name]) for run in runs)]
        for name in known
    ]
    speeds = [run.result.count / run.result.seconds if run.result.seconds else 0 for run in runs]
    rows.append(["images a second", *(f"{speed:,.0f}" for speed in speeds)])
    rows.append(["model file", *(file_size(run.model) for run in runs)])
    content = [table(["figure", *letters], rows)]
    for letter, found in zip(letters[1:], compared.differences, strict=True):
        content.append(tag("h3", f"{letter} minus A"))
        lines = [
            [
                plotting.metric_title(each.figure),
                f"{each.value:+.4f}",
                f"{each.low:+.4f} to {each.high:+.4f}",
                p_text(each.p),
                each.test,
            ]
            for each in found
        ]
        heads = ["figure", "difference", "95 % interval", "p", "test"]
        content.append(table(heads, lines))
    if len(runs) > 2:
        note = (
            "Each p is of that figure and pair alone; the verdict's are corrected for several runs."
        )
        content.append(tag("p", note, class_="fine"))
    return section("figures", "Figures", *content)


def _classes(runs: Sequence[Run], letters: str) -> Section:
    """F1 of each class, those that differ most first."""
    scores = [run.result.per_class for run in runs]
    names = [name for name, row in scores[0].items()
             if row["support"] and all(name in each for each in scores)]  # fmt: skip
    spread = {name: max(s[name]["f1"] for s in scores) - min(s[name]["f1"] for s in scores)
              for name in names}  # fmt: skip
    ranked = sorted(names, key=lambda name: -spread[name])
    rows = []
    for name in ranked:
        cells = [joined([f"{each[name]['f1']:.3f} ", bar(each[name]["f1"])]) for each in scores]
        rows.append([short(name), f"{scores[0][name]['support']:,.0f}", *cells])
    whole = table(["class", "images", *(f"F1 of {a}" for a in letters)], rows)
    many = len(rows) > MOST_ROWS
    return section(
        *("classes", "Classes", tag("p", "Those that differ most come first.")),
        folded(f"{len(rows):,} classes", whole) if many else whole,
    )


def _curves(runs: Sequence[Run], letters: str, scratch: Path) -> Section | None:
    histories = {letter: run.history for letter, run in zip(letters, runs, strict=True)}
    if sum(bool(rows) for rows in histories.values()) < 2:
        return None
    path = scratch / "curves.svg"
    plotting.compared_curves(histories, path)
    return section(
        "training", "Training", drawing(path, "Validation loss and top-1 by epoch", wide=True)
    )


def _settings(runs: Sequence[Run], letters: str) -> Section | None:
    """Those that are not the same in all."""
    if not all(run.config for run in runs):
        return None
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [
        [key, *(_value(run.config, key) for run in runs)]
        for key in keys
        if key not in UNTOLD and len({repr(run.config.get(key)) for run in runs}) > 1
    ]
    content = (
        table(["setting", *letters], rows, numbers=len(letters) + 1)
        if rows
        else tag("p", "All settings are the same.")
    )
    return section("settings", "Settings that differ", content)


def _value(config: Mapping[str, object], key: str) -> str | None:
    return setting(config[key]) if config.get(key) is not None else None


def _images(runs: Sequence[Run], dataset: Dataset, split: str, letters: str) -> Section:
    """What only one of the first and another gets right."""
    source, content = dataset.split(split), []
    for other in range(1, len(runs)):
        for better, worse in ((other, 0), (0, other)):
            outputs, count = _only(runs[better], runs[worse])
            words = _not_seen(outputs)
            shown = [
                joined([picture(image, f"the image {outputs.image_ids[at]}"), words[at]])
                for at, image in images_of(source, outputs.image_ids)
            ]
            title = f"{letters[better]} is right, {letters[worse]} is wrong: {count:,}"
            content += [tag("h3", title), tiles(shown) if shown else tag("p", "None.")]
    return section("images", "Images that only one gets right", *content)


def _only(better: Run, worse: Run) -> tuple[Outputs, int]:
    """What the second says of images that only the first gets right, those that cost most; and how
    many there are."""
    right = dict(zip(better.result.outputs.image_ids, better.result.outputs.right, strict=True))
    outputs = worse.result.outputs
    own = np.array([bool(right.get(name, False)) for name in outputs.image_ids])
    places = costly(outputs, own & ~outputs.right)
    return outputs.take(places[:MOST_IMAGES]), len(places)


def _not_seen(outputs: Outputs) -> list[Html]:
    """What is true of each image, and was said instead."""
    said = outputs.task.texts(outputs.decided.astype(np.int64))
    truth = outputs.task.texts(outputs.labels)
    return [
        joined(
            [
                tag("b", true or "nothing"),
                tag("div", "not ", tag("b", label or "nothing", class_="bad")),
                tag("div", name, class_="name"),
            ]
        )
        for name, label, true in zip(outputs.image_ids, said, truth, strict=True)
    ]


def _again(runs: Sequence[Run], dataset: Dataset, options: ReportOptions, letters: str) -> Section:
    paths = " ".join(shlex.quote(str(run.path)) for run in runs)
    given = f"--data {shlex.quote(str(dataset.folder))} --split {runs[0].result.split}"
    given += "" if options.limit is None else f" --limit {options.limit}"
    out = "" if options.out is None else f" --out {shlex.quote(str(options.out))}"
    lines = [f"distcls report {paths} {given}{out} --overwrite", f"distcls compare {paths} {given}"]
    models = [(letter, str(run.model)) for letter, run in zip(letters, runs, strict=True)]
    return section("again", "Do it again", facts(models), tag("pre", "\n".join(lines)))
