"""`report`: one self-contained HTML page about a run: data, curves, figures, mistakes, model."""

from __future__ import annotations

import itertools
import shlex
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcls import __version__, log, plotting
from distcls.audit.audit import AuditOptions, audit
from distcls.audit.findings import KINDS, counted
from distcls.audit.page import finding_tiles
from distcls.data.dataset import Dataset
from distcls.data.image_dataset import open_dataset, opened
from distcls.data.source import SPLITS
from distcls.errors import UsageError, require
from distcls.evaluation import plots
from distcls.evaluation.outputs import Outputs
from distcls.evaluation.overlap import dataset_of, training_images
from distcls.explanation.explain import explain_pixels, overlay
from distcls.files import given_path, require_distinct, require_writable, write_text
from distcls.model_card import best_model, require_model
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
from distcls.predictor import load
from distcls.report.options import ReportOptions
from distcls.report.runs import Run, costly, files_of, images_of, read_run
from distcls.report.search import place_in_search, search_report
from distcls.report.several import several_runs
from distcls.report.trials import is_search, trial_of
from distcls.report.words import NONE, file_size, in_words, of_split, setting, short
from distcls.runtime.providers import versions

SEVERITY_STYLES = {"error": "bad", "warning": "warning", "info": "soft"}
MOST_FINDINGS = 12
"""Findings that are shown as pictures."""
WORST = 24
"""Mistakes that are shown."""
MOST_CELLS = 40
"""Classes up to which a confusion matrix is drawn."""
WELL_CALIBRATED = 0.05
MOST_NAMED = 8
"""Temperatures that are named."""
FEW = 200
"""Images below which figures say little, and a calibration error less."""
LEADING = ("top1", "exact", "loss", "macro_f1", "balanced_accuracy", "auroc", "ece", "brier")
"""Figures that stand first in the table."""


def report(options: ReportOptions) -> Path:
    """Measure the models of runs on one split, and write the page; its path.

    Raises UsageError for what is no run, images that are not there, and a file that exists.
    """
    out = _output(options)
    if any(map(is_search, options.runs)):
        return _of_search(options, out)
    for path in options.runs:
        require_model(path)
        best_model(path, key="runs")
    data = options.data or dataset_of(options.runs[0])
    dataset = Dataset.open(data)
    counts = dataset.counts()
    split = options.split or next((name for name in ("test", "val") if name in counts), "train")
    read = [each for path in (*options.runs, dataset.folder) for each in files_of(path)]
    require_distinct({"out": out}, {"runs": read})
    require_writable(out.parent)
    runs = [read_run(path, data, split, options.limit) for path in options.runs]
    with tempfile.TemporaryDirectory(prefix="distcls-") as scratch:
        if len(runs) == 1:
            written = one_run(runs[0], dataset, split, options, Path(scratch))
        else:
            written = several_runs(runs, dataset, split, options, Path(scratch))
    return _write(out, written)


def _write(out: Path, written: str) -> Path:
    write_text(out, written)
    log.say(f"written: {out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


def _of_search(options: ReportOptions, out: Path) -> Path:
    """The page about a search: its trials have measured themselves."""
    folder, *others = options.runs
    if others:
        found = next(filter(is_search, options.runs))
        raise UsageError(f"runs: {found} is a search; report it alone, or name some of its trials")
    for key in ("data", "split", "limit"):
        if getattr(options, key) is not None:
            raise UsageError(
                f"{key}: {folder} is a search, of which the validation scores are shown; give one "
                "of its trials to measure its model"
            )
    require_distinct({"out": out}, {"runs": files_of(folder)})
    require_writable(out.parent)
    with tempfile.TemporaryDirectory(prefix="distcls-") as scratch:
        return _write(out, search_report(folder, Path(scratch)))


def _output(options: ReportOptions) -> Path:
    if options.out is not None:
        out = Path(given_path(options.out, "out"))
    else:
        first = options.runs[0]
        folder = first if first.is_dir() else first.parent
        out = folder / "report.html" if len(options.runs) == 1 else Path("report.html")
    html = out.suffix.lower() in (".html", ".htm") and not out.is_dir()
    require(html, "out", str(out), "the name of an .html file")
    if out.exists() and not options.overwrite:
        raise UsageError(f"{out} exists already; choose another --out or add --overwrite")
    return out


def one_run(run: Run, dataset: Dataset, split: str, options: ReportOptions, scratch: Path) -> str:
    """The page about one run."""
    sections = [
        _summary(run, dataset),
        _data(run, dataset),
        _findings(dataset) if options.audit else None,
        _training(run, scratch),
        _evaluation(run, scratch),
        _mistakes(run, dataset, split),
        _explanations(run, dataset, split, options.explain) if options.explain else None,
        _confidence(run, scratch),
        _model(run),
        _again(run, dataset, options),
    ]
    result = run.result
    several = result.task.outputs
    figure = "exact" if several else "top1"
    share = result.figures[figure]
    lead = tag(
        "p",
        f"On {_images(run, options.limit)} {f'all {several} are' if several else 'the model is'} ",
        "right for ",
        tag("b", in_words(figure, share)),
        f" ({round(share * result.count):,} of {result.count:,})",
        *_between(run, figure),
        f"; of the {several} one by one {in_words('top1', result.top1)} are" if several else "",
        ".",
    )
    return page(f"Report: {run.name}", lead, [each for each in sections if each is not None])


def _images(run: Run, limit: int | None) -> str:
    """How many images of which kind were measured."""
    first = "the first " if limit is not None else ""
    return first + log.counted(run.result.count, f"{of_split(run.result.split)} image")


def _between(run: Run, name: str) -> list[str]:
    ends = run.result.intervals.get(name)
    if ends is None:
        return []
    low, high = (in_words(name, end) for end in ends)
    return [f", 95 % interval {low} to {high}"]


# the parts


def _summary(run: Run, dataset: Dataset) -> Section:
    result, seconds = run.result, run.result.seconds
    several = result.task.outputs
    top1 = f"{several} right (top-1)" if several else "accuracy (top-1)"
    exact = [(in_words("exact", result.figures.get("exact")), f"all {several} right (exact)")]
    cells = [
        *(exact if several else ()),
        (in_words("top1", result.top1), top1),
        (in_words("macro_f1", result.figures.get("macro_f1")), "macro F1"),
        (in_words("loss", result.loss), "loss (nats)"),
        (in_words("ece", result.figures.get("ece")), "calibration error"),
        (f"{result.count / seconds:,.0f}/s" if seconds else NONE, f"images on {_backend(run)}"),
        (file_size(run.model), run.model.name),
    ]
    headline = tag("ul", *(tag("li", tag("b", v), tag("span", n)) for v, n in cells),
                   class_="headline")  # fmt: skip
    notes = [tag("li", each, class_="warning") for each in result.warnings]
    notes += [tag("li", each) for each in _trial(run)]
    notes += [tag("li", each) for each in _notes(run, dataset)]
    return section("summary", "Summary", headline, tag("ul", *notes, class_="notes"))


def _trial(run: Run) -> list[str]:
    """That it is one of many, if it is a trial of a search."""
    try:
        found = trial_of(run.path)
    except UsageError as error:
        log.warn(f"left out of the report: {error}")
        return []
    return [] if found is None else [place_in_search(*found)]


def _backend(run: Run) -> str:
    return run.result.provider.removesuffix("ExecutionProvider")


def _notes(run: Run, dataset: Dataset) -> list[Html]:
    """What to look at first."""
    result, notes = run.result, []
    trained_on = {"val": "chose the best epoch", "train": "trained it"}.get(result.split)
    if trained_on:
        notes.append(
            f"These are the images that {trained_on}: other images will do worse. A test split "
            "tells how much."
        )
    seen = training_images(run.model, dataset.folder, result.split, result.outputs.image_ids)
    if seen and not trained_on:
        notes.append(
            f"{log.counted(len(seen), 'image')} of these were in its own training split: it looks "
            "better here than it is."
        )
    if result.count < FEW:
        notes.append(
            f"{log.counted(result.count, 'image')} are few: other images may give very different "
            "figures, as the intervals say."
        )
    if result.task.single and result.count:
        support = result.metrics.support
        most = int(support.argmax())
        share = float(support[most] / max(1, support.sum()))
        always = result.classes[most]
        notes.append(f"Answering {_name(always)} to everything would be right for {share:.1%}.")
    counted = [(n, row) for n, row in result.per_class.items() if row["support"]]
    if len(counted) > 1:
        name, row = min(counted, key=lambda each: each[1]["recall"])
        if row["recall"] < 1:
            found = round(row["recall"] * row["support"])
            notes.append(
                f"The hardest class is {_name(name)}: {found:,} of its {row['support']:,.0f} "
                f"images are found ({row['recall']:.0%})."
            )
    if result.absent_classes:
        names = ", ".join(map(_name, result.absent_classes[:5]))
        absent = len(result.absent_classes)
        have = "has" if absent == 1 else "have"
        notes.append(f"{log.counted(absent, 'class')} {have} no image here: {names}")
    if result.unknown_images:
        notes.append(
            f"{result.unknown_images:,} images are of classes that the model does not know."
        )
    error = result.figures.get("ece", 0.0)
    if error > WELL_CALIBRATED and result.count >= FEW and result.task.temperatures is None:
        notes.append(
            f"Its probabilities are off by {error:.1%} on average: distcls calibrate corrects them."
        )
    return [tag("span", note) for note in notes]


def _name(name: str) -> str:
    return f"“{plotting.shorten(name, 60)}”" if name else "the empty class"


def _data(run: Run, dataset: Dataset) -> Section:
    info, counts = dataset.info, dataset.counts()
    total = sum(counts.values())
    pairs: list[tuple[str, object]] = [
        ("Source", info.get("source") or str(dataset.folder)),
        ("Task", dataset.task.summary()),
        ("Images", ", ".join([f"{total:,}", *(f"{n} {c:,}" for n, c in counts.items())])),
    ]
    if info.get("rejected"):
        pairs.append(("Left out as broken", f"{info['rejected']:,}"))
    if info.get("transparent"):
        pairs.append(("With transparency", f"{info['transparent']:,}"))
    known = info.get("class_counts")
    content: list[Html] = [facts(pairs)]
    if isinstance(known, dict) and known:
        names = [split for split in SPLITS if split in counts]
        sums = {n: sum(row.get(s, 0) for s in names) for n, row in known.items()}
        largest = max(sums.values())
        rows = [
            [
                short(n),
                bar(sums[n] / largest),
                *(f"{known[n].get(s, 0):,}" for s in names),
                f"{sums[n]:,}",
            ]
            for n in known
        ]
        content.append(_perhaps_folded(table(["class", "", *names, "all"], rows, numbers=2),
                                       len(rows), "Images of each class"))  # fmt: skip
    return section("data", "Data", *content)


def _findings(dataset: Dataset) -> Section:
    """What `distcls audit` finds in the images."""
    log.say(f"{dataset.folder}: looking at its images")
    result = audit(AuditOptions(data=str(dataset.folder), quiet=True))
    rows = [
        [KINDS[kind], tag("span", severity, class_=SEVERITY_STYLES[severity]), f"{count:,}"]
        for severity, kinds in counted(result.findings).items()
        for kind, count in kinds.items()
    ]
    if not rows:
        return section("audit", "Audit", tag("p", "Nothing stands out in the images."))
    shown = [each for each in result.findings if each.severity != "info"][:MOST_FINDINGS]
    inside = opened(open_dataset(dataset.folder))
    more = f"distcls audit {shlex.quote(str(dataset.folder))} --out audit"
    return section(
        *("audit", "Audit", table(["finding", "severity", "images"], rows, numbers=2)),
        *(
            finding_tiles(shown, inside),
            tag("p", "All of them: ", tag("code", more), class_="fine"),
        ),
    )


def _perhaps_folded(content: Html, rows: int, title: str) -> Html:
    if rows > MOST_ROWS:
        return folded(f"{title} ({rows:,})", content)
    return joined([tag("h3", title), content])


def _training(run: Run, scratch: Path) -> Section | None:
    if not run.history and not run.config:
        if not run.path.is_dir():
            return None
        note = "Its history.csv and config.yaml are missing or damaged."
        return section("training", "Training", tag("p", note))
    training, content = run.card.training, []
    pairs = [("Best epoch", training.get("epoch")), ("Epochs trained", len(run.history) or None)]
    seconds = sum(row.get("seconds", 0.0) for row in run.history)
    if seconds:
        pairs.append(("Time", log.duration(seconds)))
    keys = ("model.name", "lr", "batch_size", "optimizer.name", "precision", "seed", "source")
    pairs += [(key, run.config[key]) for key in keys if run.config.get(key) is not None]
    content.append(facts((name, value) for name, value in pairs if value is not None))
    if run.history:
        path = scratch / "curves.svg"
        metric = str(run.config.get("monitor.metric") or "top1")
        plotting.curves(run.history, path, metric, int(training.get("epoch") or 0))
        content.insert(0, drawing(path, "Loss, scores and learning rate of each epoch", wide=True))
    if run.config:
        rows = [[key, setting(value)] for key, value in run.config.items()]
        content.append(
            folded(f"All {len(rows)} settings", table(["key", "value"], rows, numbers=2))
        )
    return section("training", "Training", *content)


def _evaluation(run: Run, scratch: Path) -> Section:
    result = run.result
    figures = result.figures
    order = [*(n for n in LEADING if n in figures), *(n for n in figures if n not in LEADING)]
    rows = []
    for name in order:
        ends = result.intervals.get(name)
        between = None if ends is None else " to ".join(in_words(name, end) for end in ends)
        rows.append([plotting.metric_title(name), in_words(name, figures[name]), between])
    content: list[object] = [
        table(["figure", "value", "95 % interval"], rows),
        *(tag("p", note, class_="fine") for note in _notes_of_figures(run, order)),
    ]
    counted_ones = [(name, row) for name, row in result.per_class.items() if row["support"]]
    classes = sorted(counted_ones, key=lambda each: (each[1]["f1"], each[0]))
    heads = ["class", "precision", "recall", "F1", "images", ""]
    lines = []
    for name, row in classes:
        scores = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        lines.append([short(name), *scores, f"{row['support']:,.0f}", bar(row["f1"])])
    content.append(_perhaps_folded(table(heads, lines), len(lines), "Classes, the hardest first"))
    if result.task.single and 2 <= len(result.classes) <= MOST_CELLS:
        path = scratch / "confusion.svg"
        plotting.confusion(result.confusion, list(result.classes), path)
        content += [tag("h3", "Confusion matrix"), drawing(path, "Confusion matrix")]
    if not result.outputs.right.all():
        path = scratch / "pairs.svg"
        plots.pairs(result.outputs, path)
        content += [tag("h3", "What is taken for what"), drawing(path, "Most frequent confusions")]
    return section("evaluation", "Evaluation", *content)


def _notes_of_figures(run: Run, names: Sequence[str]) -> list[str]:
    """What the table of figures leaves open."""
    notes = ["The interval is that of other images of the same kind: small sets have wide ones."]
    if several := run.result.task.outputs:
        notes.append(f"exact: images with all {several} right; top-1: of the {several} one by one.")
    without = [name for name in names if name not in run.result.intervals]
    reasons = {"ece": "of few images it is too great by more than it varies"}
    reasons |= {name: "the same for every image" for name in run.result.scores if name != "ece"}
    told: dict[str, list[str]] = {}
    for name in without:
        told.setdefault(reasons.get(name, ""), []).append(plotting.metric_title(name))
    if without:
        parts = (", ".join(each) + f" ({why})" * bool(why) for why, each in told.items())
        notes.append(f"{NONE}: no interval is computed for {'; '.join(parts)}.")
    return notes


def _mistakes(run: Run, dataset: Dataset, split: str) -> Section | None:
    """The wrong predictions with the greatest loss."""
    outputs = run.result.outputs
    wrong = costly(outputs, ~outputs.right)
    if not len(wrong):
        return section("mistakes", "Worst mistakes", tag("p", "Every prediction is right."))
    shown = outputs.take(wrong[:WORST])
    words = _answers(shown)
    cells = [
        joined([picture(image, f"the image {shown.image_ids[at]}"), words[at]])
        for at, image in images_of(dataset.split(split), shown.image_ids)
    ]
    note = f"The {len(cells):,} of {len(wrong):,} wrong predictions that cost most."
    if len(cells) == len(wrong):
        note = f"All {len(wrong):,} wrong predictions." if len(wrong) > 1 else "The one mistake."
    return section("mistakes", "Worst mistakes", tag("p", note), tiles(cells))


def _answers(outputs: Outputs) -> list[Html]:
    """What is said of each image, and what is true."""
    said = outputs.task.texts(outputs.decided.astype(np.int64))
    truth = outputs.task.texts(outputs.labels)
    chances = outputs.confidence(slice(None)).tolist()
    rows = zip(outputs.image_ids, said, truth, chances, outputs.right.tolist(), strict=True)
    return [
        joined(
            [
                tag("b", label or "nothing", class_=None if right else "bad"),
                f" {chance:.0%}",
                tag("div", "labelled ", tag("b", true or "nothing")),
                tag("div", name, class_="name"),
            ]
        )
        for name, label, true, chance, right in rows
    ]


def _explanations(run: Run, dataset: Dataset, split: str, number: int) -> Section | None:
    """Where the network looks: half of the pictures are the worst mistakes, half are right."""
    outputs = run.result.outputs
    mistakes = costly(outputs, ~outputs.right)
    good = _one_of_each(outputs, np.flatnonzero(outputs.right))
    half = min(len(mistakes), max(number // 2, number - len(good)))
    chosen = [*mistakes[:half].tolist(), *good[: number - half]]
    if not chosen:
        return None
    shown, cells = outputs.take(np.array(chosen)), []
    words = _answers(shown)
    log.say(f"{run.path}: explaining {log.counted(len(chosen), 'image')}")
    with load(run.model) as predictor:
        for at, image in images_of(dataset.split(split), shown.image_ids):
            name = shown.image_ids[at]
            found = explain_pixels(predictor.model, predictor.card.preprocess(image))
            pair = (
                picture(found.pixels, f"what the network sees of {name}"),
                picture(overlay(found.pixels, found.heat), "what its prediction rests on"),
            )
            cells.append(joined([tag("div", *pair, class_="pair"), words[at]]))
    note = (
        "What the prediction rests on is bright. A map on the background, a watermark or a corner "
        "shows a shortcut; one on the object does not prove that the network knows it."
    )
    return section("explanation", "Where it looks", tag("p", note), tiles(cells))


def _one_of_each(outputs: Outputs, rows: NDArray[np.int64]) -> list[int]:
    """Some of these images, of as many classes as there are, in turn."""
    seen: dict[tuple[int, ...], list[int]] = {}
    for row in rows.tolist():
        seen.setdefault(tuple(outputs.labels[row].tolist()), []).append(row)
    turns = itertools.zip_longest(*seen.values())
    return [row for turn in turns for row in turn if row is not None]


def _confidence(run: Run, scratch: Path) -> Section:
    outputs = run.result.outputs
    error = run.result.figures.get("ece", 0.0)
    state = "calibrated" if run.result.task.temperatures is not None else "as trained"
    words = f"The probabilities are {state}. "
    words += (
        f"On average they are {error:.1%} away from how often they come true."
        if len(outputs) >= FEW
        else f"How far they are off cannot be said from {log.counted(len(outputs), 'image')}."
    )
    drawn: dict[str, tuple[Callable[[Outputs, Path], None], str]] = {
        "reliability": (plots.reliability, "Reliability diagram: accuracy against confidence"),
        "thresholds": (plots.thresholds, "What a minimum probability does"),
    }
    shown = []
    for name, (draw, label) in drawn.items():
        draw(outputs, scratch / f"{name}.svg")
        shown.append(drawing(scratch / f"{name}.svg", label))
    content = [tag("p", words), tag("div", *shown, class_="two")]
    if "auroc" in run.result.figures:
        plots.curves(outputs, scratch / "roc.svg")
        content += [
            tag("h3", "Each class against the rest"),
            drawing(scratch / "roc.svg", "ROC and precision-recall curves", wide=True),
        ]
    return section("confidence", "Confidence", *content)


def _model(run: Run) -> Section:
    card, certificate = run.card, run.card.certificate
    height, width = card.preprocess.size
    pairs: list[tuple[str, object]] = [
        ("File", str(run.model)),
        ("Architecture", card.architecture.get("name")),
        ("Input", f"{height} x {width} pixels, resized by {card.preprocess.resize}"),
        ("Size", file_size(run.model)),
        ("Trained with", f"distcls {card.to_json()['version']}"),
    ]
    if certificate is None:
        said = "none: distcls export compares the exported model with the checkpoint"
    else:
        least = min(each["top1_agreement"] for each in certificate["results"])
        most = max(each["max_logit_difference"] for each in certificate["results"])
        said = (
            f"{least:.2%} of the predictions for {certificate['images']:,} {certificate['split']} "
            f"images are those of the checkpoint, logits within {most:.1e} "
            f"({certificate['reference']})"
        )
    pairs.append(("Certificate", said))
    if certificate and (distinct := certificate.get("distinct_predictions")):
        pairs.append(("", f"{distinct:,} distinct predictions among them"))
    if (calibration := card.calibration) is not None:
        temperatures = calibration["temperatures"]
        found = ", ".join(f"{value:.3f}" for value in temperatures[:MOST_NAMED])
        more = "" if len(temperatures) <= MOST_NAMED else f", ... ({len(temperatures):,} in all)"
        pairs.append(("Calibrated by", f"temperature {found}{more}"))
    return section("model", "Model", facts(pairs))


def _again(run: Run, dataset: Dataset, options: ReportOptions) -> Section:
    quoted = {name: shlex.quote(str(path)) for name, path in
              (("run", run.path), ("data", dataset.folder), ("model", run.model))}  # fmt: skip
    lines = []
    config = run.path / "config.yaml"
    if run.path.is_dir() and config.is_file():
        lines.append(f"distcls train --config {shlex.quote(str(config))} --out runs/again")
    split = run.result.split
    limit = "" if options.limit is None else f" --limit {options.limit}"
    same = limit + ("" if options.audit else " --audit false")
    same += f" --explain {options.explain}"
    if options.out is not None:
        same += f" --out {shlex.quote(str(options.out))}"
    where = f"--data {quoted['data']} --split {split}"
    lines += [
        f"distcls evaluate --model {quoted['model']} {where}{limit}",
        f"distcls predict FOLDER --model {quoted['model']}",
        f"distcls report {quoted['run']} {where}{same} --overwrite",
    ]
    found = {"distcls": __version__, "numpy": np.__version__, **versions()}
    made = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return section(
        *("again", "Do it again", tag("pre", "\n".join(lines))),
        tag("p", f"This page was made with {made}.", class_="fine"),
    )
