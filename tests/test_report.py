"""`distcls report`: what its page says, and how it looks in a real browser."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import distcls
from distcls.commands.compare import main as compare
from distcls.commands.report import main
from distcls.data.dataset import Dataset
from distcls.errors import UsageError
from distcls.evaluation import plots
from distcls.model_card import SEARCH_TABLE
from distcls.page import COLORS, STYLE
from distcls.plotting import BLUE, GREEN, GREY, ORANGE, RED
from tests import tiny_dataset, tiny_onnx
from tests.searches import make_search

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NAMES = ("<img src=x onerror=alert(1)>", "x" * 90, "\u202eقطة & 🦊")
COUNT = 60


class Outline(HTMLParser):
    """Texts of a page, its sections, and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.sources: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "section":
            self.sections.append(str(values["id"]))
        self.sources += [str(values[key]) for key in ("src", "href") if key in values]
        if tag not in ("meta", "img", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def make_run(folder: Path, classes: tuple[str, ...] = tiny_onnx.COLOURS, seed: int = 0) -> Path:
    """A run directory with a model that is right for three of four of its test images."""
    folder.mkdir(parents=True)
    tiny_onnx.write(folder / "best.onnx", tiny_onnx.card(classes))
    images, labels = tiny_dataset.coloured(COUNT, seed=seed)
    truth = np.array(labels)
    truth[:15] = (truth[:15] + 1) % 3
    splits = ["test"] * 50 + ["train"] * 10
    where = {"splits": splits, "files": True}
    tiny_dataset.write(folder / "dataset", list(images), truth.tolist(), classes, **where)
    (folder / "config.yaml").write_text(f"lr: 0.01\nmodel:\n  name: tiny\nnote: '{classes[0]}'\n")
    (folder / "history.csv").write_text(
        "epoch,train_loss,val_loss,val_top1,lr,seconds\n1,1.1,1.0,0.5,0.01,61\n2,0.9,nan,0.7,0,60\n"
    )
    return folder


def outline(path: Path) -> Outline:
    return Outline(path.read_text(encoding="utf-8"))


def test_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    main([str(run), "--quiet"])
    path = run / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    found = outline(path)
    assert found.sections == [
        *("summary", "data", "audit", "training", "evaluation", "mistakes", "explanation"),
        *("confidence", "model", "again"),
    ]
    assert not found.open or found.open == ["html"]
    # nothing is loaded: pictures lie in it, links lead to its sections
    assert all(source.startswith(("data:image/", "#")) for source in found.sources)
    assert {f"#{name}" for name in found.sections} <= set(found.sources)
    assert "On 50 test images the model is right for 72.0% (36 of 50)" in found.text
    assert "Time 2 min" in found.text
    assert f"distcls train --config {run}/config.yaml" in found.text
    assert found.text.count("labelled") >= 15
    assert path.stat().st_size < 3_000_000
    with pytest.raises(UsageError, match="exists already"):
        main([str(run)])


def test_the_figures_are_those_of_evaluate(tmp_path: Path) -> None:
    from distcls import evaluate_model

    run = make_run(tmp_path / "run")
    main([str(run), "--quiet", "--explain", "0"])
    found = outline(run / "report.html")
    assert "explanation" not in found.sections
    result = evaluate_model(run, run / "dataset", split="test", quiet=True)
    low, high = result.intervals["top1"]
    assert f"top-1 {result.top1:.1%} {low:.1%} to {high:.1%}" in found.text
    assert f"loss {result.loss:.4f}" in found.text
    name, row = min(result.per_class.items(), key=lambda each: each[1]["recall"])
    assert f"The hardest class is \N{LEFT DOUBLE QUOTATION MARK}{name}" in found.text
    assert f"({row['recall']:.0%})" in found.text


@pytest.mark.parametrize("kind", ["heads", "labels"])
def test_other_tasks(tmp_path: Path, kind: str) -> None:
    images, labels = tiny_dataset.coloured(COUNT)
    tiny_dataset.write_images(tmp_path / "files", images)
    lines, options = ["path,hue,odd,all"], {"path_column": "path", "test_fraction": 0.5}
    for place, label in enumerate(labels):
        name, odd = tiny_onnx.COLOURS[label], place % 2
        lines.append(f"{place:03d}.png,{name},{odd},{name}{' odd' if odd else ''}")
    (tmp_path / "files" / "all.csv").write_text("\n".join(lines) + "\n")
    options |= {"label_columns": ["hue", "odd"]} if kind == "heads" else {"labels_column": "all"}
    if kind == "labels":
        options["separator"] = " "
    distcls.prepare_dataset(tmp_path / "files" / "all.csv", tmp_path / "data", **options)
    task = Dataset.open(tmp_path / "data").task
    assert task.kind == ("multi_head" if kind == "heads" else "multi_label")
    card = dataclasses.replace(tiny_onnx.card(), task=task)
    model = tiny_onnx.write(tmp_path / "model.onnx", card)
    out = tmp_path / "page.html"
    main([str(model), "--data", str(tmp_path / "data"), "--out", str(out), "--quiet"])
    found = outline(out)
    assert {"mistakes", "confidence", "explanation"} <= set(found.sections)
    result = distcls.evaluate_model(model, tmp_path / "data", quiet=True)
    exact, top1 = result.figures["exact"], result.figures["top1"]
    assert exact < top1
    lead = f"On {result.count} test images all {kind} are right for {exact:.1%}"
    assert lead in found.text
    assert f"of the {kind} one by one {top1:.1%} are." in found.text
    assert f"{exact:.1%} all {kind} right (exact) {top1:.1%} {kind} right (top-1)" in found.text
    assert re.search(r"no interval is computed for .*ECE \(.*; macro precision, ", found.text)
    wrong = result.count - round(exact * result.count)
    assert (f"All {wrong} wrong predictions." in found.text) == (1 < wrong <= 24)
    # beside another model every place has the same figures
    beside = shutil.copy(model, tmp_path / "other.onnx")
    main(
        [
            *map(str, (model, beside)),
            "--data",
            str(tmp_path / "data"),
            "--out",
            str(out),
            "--quiet",
            "--overwrite",
        ]
    )
    found = outline(out)
    assert f"all {kind} right (exact); {top1:.1%} of the {kind} (top-1)" in found.text
    assert found.text.count(f"{exact:.1%}") >= 4
    assert "B minus A figure difference 95 % interval p test exact +0.0000" in found.text
    assert f"+0.00 points of exact, all {kind} of an image right (" in found.text


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second takes red for green."""
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second")
    swapped = tiny_onnx.card(("green", "red", "blue"))
    tiny_onnx.write(second / "best.onnx", swapped)
    (second / "config.yaml").write_text("lr: 0.02\nmodel:\n  name: tiny\nnote: red\n")
    words = [str(first), str(second), "--data", str(first / "dataset")]
    main([*words, "--out", str(tmp_path / "both.html"), "--quiet"])
    capsys.readouterr()
    compare([*words, "--json", "--quiet"])
    told = json.loads(capsys.readouterr().out)["comparisons"][0]
    found = outline(tmp_path / "both.html")
    assert found.sections == [
        *("verdict", "figures", "classes", "training", "settings", "images", "again"),
    ]
    assert told["verdict"].startswith("A is better than B by")
    assert told["verdict"] in found.text
    only = re.findall(r"is right, . is wrong: (\d+)", found.text)
    assert told["figure"] == "top1"
    difference = next(each for each in told["differences"] if each["figure"] == "top1")
    assert int(only[0]) - int(only[1]) == round(50 * difference["difference"])
    assert "setting A B lr 0.01 0.02" in found.text
    assert "note" not in found.text
    assert found.text.count("labelled") == 0


def test_without_a_run_around_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    model = shutil.move(run / "best.onnx", tmp_path / "alone.onnx")
    out = tmp_path / "deep" / "page.html"
    with pytest.raises(UsageError, match=r"data: .*alone.onnx has no dataset directory"):
        main([str(model), "--out", str(out)])
    assert not out.parent.exists()
    main([str(model), "--data", str(run / "dataset"), "--out", str(out), "--quiet"])
    found = outline(out)
    assert "training" not in found.sections
    assert "--config" not in found.text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["none"], "none"),
        (["run", "--split", "tset"], "split: 'tset' is not valid"),
        (["run", "--split", "val"], "no split 'val'"),
        (["run", "--explain", "-1"], "explain: -1 is not valid, expected 0 to 48"),
        (["run", "--out", "."], "out: '.' is not valid, expected the name of an .html file"),
        (["run", "--out", "run/config.yaml", "--overwrite"], "expected the name of an .html file"),
        (["run", "run/"], "one is given twice"),
        (["run", "--out", "run/best.onnx", "--overwrite"], "expected the name of an .html file"),
        ([], "RUNS"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    run = make_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    size = (run / "best.onnx").stat().st_size
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        main(arguments)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (run / "best.onnx").stat().st_size == size


@pytest.mark.parametrize("content", ["\0\xff", "epoch\nx\n", "a,b\n1,2\n", "[" * 5000])
def test_damaged_files_of_a_run_are_left_out(tmp_path: Path, content: str) -> None:
    run = make_run(tmp_path / "run")
    for name in ("history.csv", "config.yaml"):
        (run / name).write_bytes(content.encode("latin-1"))
    main([str(run), "--quiet"])
    found = outline(run / "report.html")
    assert "evaluation" in found.sections
    assert "training" in found.sections


def test_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = "import sys; sys.modules['torch'] = None; from distcls.commands.report import main; "
    call = [sys.executable, "-c", code + f"main([{str(run)!r}, '--quiet'])"]
    subprocess.run(call, check=True)
    assert "explanation" in outline(run / "report.html").sections


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_lines_of_drawings_stand_out(scheme: str) -> None:
    style = STYLE.read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6});", part)) for part in style.split("@media")[:2]
    )
    colors = {"light": {"panel": "#ffffff"} | light, "dark": light | dark}[scheme]
    drawn = {BLUE, ORANGE, GREEN, RED, GREY, *plots.COLORS}
    assert drawn <= COLORS.keys()
    for color in drawn:
        own = colors[COLORS[color].removeprefix("var(--").removesuffix(")")]
        assert _contrast(own, colors["panel"]) > {"light": 2.8, "dark": 5}[scheme]


def _contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    light = []
    for color in (one, other):
        parts = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(light) / min(light)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="distcls[dev] is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(chromium: Any, page: Path, width: int, scheme: str) -> None:
    """On a screen so wide, light or dark."""
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    chromium.get(page.as_uri())


def test_in_a_browser(tmp_path: Path, chromium: Any) -> None:
    """Names of classes as hostile as they come, a phone, dark, keyboard, print."""
    run = make_run(tmp_path / "run", NAMES)
    main([str(run), "--quiet"])
    for width, scheme in ((1200, "light"), (390, "dark")):
        show(chromium, run / "report.html", width, scheme)
        ask = chromium.execute_script
        assert ask("return document.documentElement.scrollWidth") <= width
        pictures = ask("return [...document.images].map((image) => image.naturalWidth)")
        assert len(pictures) >= 15
        assert min(pictures) > 0
        heights = "map((drawing) => drawing.getBoundingClientRect().height)"
        drawings = ask(f"return [...document.querySelectorAll('svg')].{heights}")
        assert len(drawings) == 6
        assert min(drawings) > 100
        # the letters of drawings stand out from the ground in both schemes
        ink, ground = (
            ask(f"return getComputedStyle({where}).{key}")
            for where, key in (
                ("document.querySelector('svg text')", "fill"),
                ("document.querySelector('section')", "backgroundColor"),
            )
        )
        assert abs(_light(ink) - _light(ground)) > 120
        assert NAMES[1] in ask("return document.body.innerText")
        # what is cut at the side has a shade there, which stays while its cover scrolls away
        places = "[...document.querySelectorAll('.wide')]"
        cut = f"{places}.filter((each) => each.scrollWidth > each.clientWidth)"
        assert ask(f"return {cut}.length") > (2 if width == 390 else -1)
        kinds = ask(f"return {places}.map((each) => getComputedStyle(each).backgroundAttachment)")
        assert set(kinds) == {"local, local, scroll, scroll"}
    ask("document.activeElement.blur()")
    from selenium.webdriver.common.keys import Keys

    chromium.switch_to.active_element.send_keys(Keys.TAB)
    assert ask("return document.activeElement.getAttribute('href')") == "#content"
    assert not [e for e in chromium.get_log("browser") if "favicon" not in e["message"]]
    printed = chromium.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 20_000


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_search_in_a_browser(tmp_path: Path, chromium: Any, width: int, scheme: str) -> None:
    folder = make_search(tmp_path / "lr")
    table = folder / SEARCH_TABLE
    table.write_text(
        table.read_text().replace(",sgd,", f",{NAMES[0]}$x^$,").replace(",adamw,", f",{NAMES[2]},")
    )
    main([str(folder), "--quiet"])
    show(chromium, folder / "report.html", width, scheme)
    ask = chromium.execute_script
    assert ask("return document.documentElement.scrollWidth") <= width
    drawings = ask("return [...document.querySelectorAll('svg')].map((d) => d.clientHeight)")
    assert len(drawings) == 2
    assert min(drawings) > 100
    ink, ground = (
        ask(f"return getComputedStyle({where}).{key}")
        for where, key in (
            ("document.querySelector('svg text')", "fill"),
            ("document.querySelector('section')", "backgroundColor"),
        )
    )
    assert abs(_light(ink) - _light(ground)) > 120
    assert NAMES[0] in ask("return document.body.innerText")
    assert "\u202e" not in ask("return document.body.innerText")
    assert not [e for e in chromium.get_log("browser") if "favicon" not in e["message"]]


def _light(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3
