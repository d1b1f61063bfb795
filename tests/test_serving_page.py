"""The page of `distcls serve` in a headless Chromium, against the server itself.

Whatever a test does, at its end the page has broken no rule of its Content-Security-Policy and has
asked no other server for anything.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import distcls
from distcls.imaging import Preprocess
from distcls.task import Head, Task
from tests import tiny_onnx
from tests.pictures import BLUE, GREEN, RED, Pixels, encode, smooth

pytest.importorskip("uvicorn", reason="distcls[serve] is not installed")
webdriver = pytest.importorskip("selenium.webdriver", reason="distcls[dev] is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs Chromium and chromedriver (Debian's packages chromium and chromium-driver)",
)

ROOT = Path(__file__).parent.parent
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\">",
    "'\"><script>document.title='owned'</script>",
    "قطة برية صغيرة",
    "🦊 fox",
    "x" * 100,
    "{{7*7}} ${7*7}",
)
FILE = "<img src=x onerror=document.title='owned'>.png"
# what breaks the policy, from before the page's own script on
RECORD = """
window.violations = [];
document.addEventListener("securitypolicyviolation",
  (event) => window.violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""
# files as a user brings them: [name, type, base64]
FILES = """
const [kind, target, files] = arguments;
const transfer = new DataTransfer();
for (const [name, type, content] of files) {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  transfer.items.add(new File([bytes], name, { type }));
}
const options = { bubbles: true, cancelable: true };
const at = document.querySelector(target);
if (kind === "paste") {
  at.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
} else {
  at.dispatchEvent(new DragEvent("dragenter", { ...options, dataTransfer: transfer }));
  at.dispatchEvent(new DragEvent("drop", { ...options, dataTransfer: transfer }));
}
"""
File = tuple[str, str, bytes]


def plain(colour: tuple[int, int, int], height: int = 20, width: int = 20) -> Pixels:
    """A picture of one colour, which is its class."""
    return np.full((height, width, 3), colour, np.uint8)


def png(name: str, picture: Pixels) -> File:
    """A file as a browser has it."""
    return name, "image/png", encode(picture, "PNG")


RED_FILE = png("red.png", plain(RED))
BROKEN = ("broken.png", "image/png", encode(smooth(), "PNG")[:200])


def _certificate(*warnings: str) -> dict[str, Any]:
    results = [
        {"batch_size": size, "top1_agreement": 1.0, "max_logit_difference": 1e-5} for size in (1, 7)
    ]
    measured = {"images": 40, "split": "val", "tolerance": 1e-3, "distinct_predictions": 3}
    return {**measured, "results": results, "reference": "a", "provider": "b", "warnings": warnings}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: the first of them by name is the one that the page opens with."""
    folder = tmp_path_factory.mktemp("models")

    def put(name: str, task: Task, **more: Any) -> None:
        card = tiny_onnx.card(task.classes)
        tiny_onnx.write(folder / f"{name}.onnx", dataclasses.replace(card, task=task, **more))

    crop = Preprocess(size=(24, 16), resize="crop", crop_fraction=0.8)
    scores = {"dataset": "colours", "epoch": 3, "validation": {"top1": 0.9383}}
    put("colours", Task(classes=tiny_onnx.COLOURS), preprocess=crop, training=scores)
    put("heads", Task.of_heads([Head("a", ("p", "q")), Head("<b>b</b>", ("r", "s"))]))
    unsafe = _certificate("<b>the same class</b> for all images")
    put("hostile", Task(classes=HOSTILE), certificate=unsafe, training={"<u>": "<i>x</i>"})
    put("labels", Task(kind="multi_label", classes=("warm", "grassy", "cold")))
    put("one", Task(classes=("only",)), certificate=_certificate())
    put("thousand", Task(classes=tuple(f"class {index}" for index in range(1000))))
    return folder


@contextlib.contextmanager
def serving(log: Path, *arguments: object, token: str | None = None) -> Iterator[str]:
    """`distcls serve` on a free port; its address."""
    environment = {**os.environ, **({"DISTCLS_TOKEN": token} if token else {})}
    command = [sys.executable, "-m", "distcls", "serve", "--port", "0", "--provider", "cpu"]
    command += ["--engine", "threads", "--workers", "1", *map(str, arguments)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield until(lambda: _address(log, process), 60)
    finally:
        process.terminate()
        process.wait(30)


def _address(log: Path, process: subprocess.Popen[bytes]) -> str | None:
    assert process.poll() is None, log.read_text()
    found = re.search(r"ready.*(http://127\.0\.0\.1:\d+)/", log.read_text())
    return found and found[1]


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of all the models, which takes 1 MB in a request."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with serving(log, "--models", models, "--max-body", 1, "--explain") as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for all tests; nothing of it leaves this machine."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument("--disable-background-networking")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": RECORD})
    yield driver
    driver.quit()


def until(look: Callable[[], Any], seconds: float = 20) -> Any:
    """What `look` gives once it gives something."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "that did not come"
        time.sleep(0.03)
    return found


class Page:
    """The page as a user has it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str, *, width: int = 1200, dark: bool = False) -> None:
        """Load it in a window of that width."""
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(address)

    def ready(self, address: str, model: str = "", **options: Any) -> None:
        """Load it, and wait for the card; of another model than the first by the selector."""
        self.open(address, **options)
        until(lambda: self("#card").get_attribute("aria-busy") == "false")
        if model:
            Select(self("#model")).select_by_value(model)
            until(lambda: self.text("#title") == model)

    def __call__(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        """The elements that fit, perhaps none."""
        found: list[Any] = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return found

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script."""
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        """The text of an element, shown or not."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        """The text of each element that fits."""
        script = "return [...document.querySelectorAll(arguments[0])].map((at) => at.textContent)"
        return [str(text) for text in self.run(script, selector)]

    def drop(self, *files: File, kind: str = "drop", target: str = "#drop") -> None:
        """Bring files, and wait for nothing."""
        coded = [[name, type_, base64.b64encode(body).decode()] for name, type_, body in files]
        self.run(FILES, kind, target, coded)

    def answers(self, number: int) -> list[str]:
        """The labels of so many answered images, or their errors; in the order of the page."""
        until(lambda: len(self.all(".result.done, .result.failed")) == number)
        return self.texts(".result .label > bdi")

    def predicted(self) -> int:
        """Requests for predictions up to now, and none to another server."""
        return sum("/predict" in url for url in self.requests())

    def requests(self) -> list[str]:
        """Addresses that the page has asked since the last call."""
        entries = [json.loads(entry["message"]) for entry in self.driver.get_log("performance")]
        sent = [e["message"] for e in entries if e["message"]["method"].endswith("WillBeSent")]
        return [message["params"]["request"]["url"] for message in sent]


@pytest.fixture
def page(chromium: Any) -> Iterator[Page]:
    """The page; at the end of the test it has kept to its policy and to its server."""
    chromium.get_log("performance")
    found = Page(chromium)
    yield found
    origin = found.run("return location.origin")
    elsewhere = [url for url in found.requests() if not url.startswith((origin, "blob:", "data:"))]
    violations = found.run("return window.violations")
    title = chromium.title
    chromium.get("about:blank")
    assert not elsewhere
    assert not violations
    assert title.endswith("distcls"), "a name became markup"


def test_dropped_image(page: Page, server: str, models: Path) -> None:
    picture = smooth(40, 60, seed=3)
    page.ready(server)
    page.drop(png("photo.png", picture))
    with distcls.load(models / "colours.onnx", quiet=True) as predictor:
        expected = predictor(picture)
        card = predictor.card
    assert page.answers(1) == [expected.label]
    assert page.texts(".file") == ["photo.png"]
    shown = [f"{100 * p:.1f}\u202f%" for _, p in expected.top_k(3)]
    assert page.texts(".bars .number") == shown
    assert page.text(".sure") == shown[0]
    widths = page.run("return [...document.querySelectorAll('.track i')].map(at => at.style.width)")
    assert [float(width[:-1]) for width in widths] == pytest.approx(
        [100 * p for _, p in expected.top_k(3)], abs=0.01
    )
    kept = [re.sub(r"[\d.< ]+\u202fm?s$", "", text) for text in page.texts(".time span")]
    assert [text.strip() for text in kept] == ["decode", "queue", "infer", "round trip"]

    page(".result .input").click()
    assert page("#seen").is_displayed()
    source = page("#seen-one").get_attribute("src")
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
    assert np.array_equal(seen, card.preprocess(picture))
    assert page("#seen-one").size == {"width": 16, "height": 24}
    large = page("#seen-large")
    assert large.get_attribute("src") == source
    assert large.value_of_css_property("image-rendering") == "pixelated"
    assert large.size["width"] % 16 == 0
    assert large.size["width"] > 200
    assert "80\u202f% of its sides" in page.text("#seen-rule")


def test_what_a_prediction_rests_on(page: Page, server: str) -> None:
    page.ready(server)
    page.drop(RED_FILE, ("blue.png", "image/png", encode(plain(BLUE), "PNG")))
    page.answers(2)
    page.all(".input")[0].click()
    assert not page("#seen-heat").is_displayed()
    page("#seen-explain").click()
    until(lambda: page("#seen-heat").is_displayed())
    assert page.run("return document.getElementById('seen-heat').naturalWidth") >= 100
    assert page.text("#seen-told") == "What the prediction rests on is bright."
    page("#seen-close").click()
    page.all(".input")[1].click()  # another image has a map of its own
    assert not page("#seen-heat").is_displayed()
    assert page("#seen-explain").is_displayed()


def test_dropped_folder(page: Page, server: str, tmp_path: Path) -> None:
    for name, colour in {"b/10.png": BLUE, "b/9.png": GREEN, "a.png": RED}.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(encode(plain(colour), "PNG"))
    (tmp_path / "folder" / "notes.txt").write_text("no image, and not asked for by name")
    page.ready(server)
    files = {"items": [], "files": [str(tmp_path / "folder")], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": 400, "y": 300, "data": files}
        page.driver.execute_cdp_cmd("Input.dispatchDragEvent", event)
        assert page.run("return document.body.className") == ("" if kind == "drop" else "over")
    assert page.answers(3) == ["red", "green", "blue"]
    assert page.texts(".file") == ["a.png", "9.png", "10.png"]


def test_pasted_and_chosen_images(page: Page, server: str, tmp_path: Path) -> None:
    page.ready(server)
    page.drop(RED_FILE, kind="paste", target="body")
    assert page.answers(1) == ["red"]
    paths = [tmp_path / "green.png", tmp_path / "blue.png"]
    for path, colour in zip(paths, (GREEN, BLUE), strict=True):
        path.write_bytes(encode(plain(colour), "PNG"))
    page("#choose").send_keys("\n".join(map(str, paths)))
    assert page.answers(3) == ["green", "blue", "red"]  # the newest above
    page("#choose").send_keys(str(paths[0]))  # the same once more
    assert page.answers(4)[0] == "green"
    page("#clear").click()
    assert not page.all(".result")
    page.drop(kind="paste", target="body")  # text, say
    assert "no image file" in page.text("#notice-text")


def test_what_is_no_image_says_so_on_its_card(page: Page, server: str) -> None:
    page.ready(server)
    large = ("large.png", "image/png", b"\x89PNG" + bytes(1 << 20))
    page.requests()
    page.drop(large, ("notes.txt", "text/plain", b"words"), ("empty.png", "image/png", b""))
    refused = page.answers(3)
    assert re.fullmatch(r"too large: .*MB, the server takes 1.MB; it was not sent", refused[0])
    assert refused[1:] == ["not an image (text/plain)", "the file is empty"]
    assert not page.predicted()

    page.drop(RED_FILE, BROKEN, ("noise", "", b"neither type nor sense"), RED_FILE)
    found = page.answers(7)[:4]
    assert [found[0], found[3]] == ["red", "red"]
    assert all(text and "red" not in text for text in found[1:3])
    assert page.predicted() == 1
    page.drop(BROKEN)  # alone it is a reply of 400
    assert page.answers(8)[0] == found[1]
    assert page.text("#status") == "8 images, 6 without a prediction"


def test_ten_at_once_in_their_order(page: Page, server: str) -> None:
    page.ready(server)
    colours = dict(zip(tiny_onnx.COLOURS, (RED, GREEN, BLUE), strict=True))
    names = [tiny_onnx.COLOURS[number % 3] for number in (0, 1, 2, 2, 0, 1, 1, 0, 2, 0)]
    page.requests()
    page.drop(*(png(f"{at}.png", plain(colours[name])) for at, name in enumerate(names)))
    assert page.answers(10) == names
    assert page.texts(".file") == [f"{at}.png" for at in range(10)]
    assert page.predicted() == 3
    assert page.text("#status") == "10 images"


def test_hostile_names_are_text(page: Page, server: str) -> None:
    page.ready(server, "hostile")
    page.drop((FILE, "image/png", encode(smooth(), "PNG")))
    assert page.answers(1)[0] in HOSTILE
    assert page.texts(".file") == [FILE]
    assert page.texts(".classes li") == list(HOSTILE)
    assert set(page.texts(".bars .name")) < set(HOSTILE)
    assert page.texts(".warnings li") == ["<b>the same class</b> for all images"]
    assert page.run("return document.querySelectorAll('main script, main b, main u').length") == 0
    page(".result .input").click()
    assert page.text("#seen-name") == FILE


def test_a_broken_policy_would_be_seen(chromium: Any, server: str) -> None:
    chromium.get(server)
    inline = "document.body.append(Object.assign(document.createElement('script'), {text: '1'}))"
    for script in (inline, "fetch('http://127.0.0.1:9/').catch(() => 0)"):
        chromium.execute_script(script)
    found = until(lambda: chromium.execute_script("return violations.length > 1 && violations"))
    assert [text.split()[0] for text in found] == ["script-src-elem", "connect-src"]
    chromium.get("about:blank")


def test_every_kind_of_model(page: Page, server: str) -> None:
    page.ready(server)
    page.drop(RED_FILE)
    assert page.answers(1) == ["red"]
    for model, label in {"one": "only", "heads": "ps", "thousand": "class 0"}.items():
        Select(page("#model")).select_by_value(model)
        until(lambda label=label: page.texts(".result.done .label > bdi") == [label])
        if model == "one":
            assert page.texts(".bars .number") == ["100.0\u202f%"]
            assert "same prediction as its checkpoint for every one" in page.text("#card")
            assert "3 different predictions" in page.text("#card")
        elif model == "heads":
            rows = [page.texts(f".bars li:nth-child({row}) .name") for row in (1, 2)]
            assert rows == [["a", "p"], ["<b>b</b>", "s"]]
            assert "not compared with its checkpoint" in page.text("#card")
        else:
            assert len(page.texts(".bars li")) == 5
            assert len(page.all(".classes li")) == 1000
            assert sum(found.is_displayed() for found in page.all(".classes li")[:40]) == 12
    Select(page("#model")).select_by_value("labels")
    tags = until(lambda: page.texts(".result.done .tag"))
    assert tags[0] == "warm"
    assert page.texts(".bars .in .name") == tags
    assert page.text(".bars .name") == "warm"
    assert len(page.texts(".bars .name")) == 3


def test_model_card(page: Page, server: str) -> None:
    page.ready(server)
    rows = dict(zip(page.texts("#card dt"), page.texts("#card dd"), strict=True))
    assert rows["Name"] == "colours"
    assert rows["Input"] == "16 \u00d7 24"
    assert rows["Runs on"].startswith("CPU")
    assert rows["dataset"] == "colours"
    assert rows["validation top-1"] == "0.9383"
    assert re.fullmatch(r"[0-9a-f]{64}", page.text(".hash"))
    assert len(page.all("#model option")) == 6


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_command(page: Page, server: str, tmp_path: Path) -> None:
    page.ready(server, "one")
    grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", grant)
    page("#copy").click()
    until(lambda: page.text("#copy") == "Copied")
    script = "const done = arguments[0]; navigator.clipboard.readText().then(done)"
    command = page.driver.execute_async_script(script)
    assert command == page.text("#curl")
    (tmp_path / "photo.jpg").write_bytes(encode(smooth(), "JPEG"))
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, check=True)
    assert json.loads(done.stdout)["predictions"][0]["label"] == "only"


def test_keyboard_alone(page: Page, server: str, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED_FILE[2])
    page.ready(server)
    page("#choose").send_keys(str(tmp_path / "red.png"))
    page.answers(1)

    def press(*keys: str) -> str:
        webdriver.ActionChains(page.driver).send_keys(*keys).perform()
        found = "const at = document.activeElement; return at.id || at.className || at.tagName"
        return str(page.run(found))

    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    reached = [press(Keys.TAB) for _ in range(9)]
    order = ["skip", "model", "choose", "clear", "input"]
    assert [name for name in reached if name in order] == order
    page.run("document.querySelector('.result .input').focus()")
    visible = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert visible == "solid"
    assert press(Keys.ENTER) == "seen-close"
    assert page("#seen").is_displayed()
    assert press(Keys.ESCAPE) == "input"
    assert not page("#seen").is_displayed()
    page.run("document.querySelector('#clear').focus()")
    assert press(Keys.ENTER) == "drop"
    assert not page.all(".result")


def test_screen_readers(page: Page, server: str) -> None:
    page.ready(server)
    page.drop(RED_FILE, BROKEN)
    page.answers(2)
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = {
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    }
    assert ("button", "Choose files") in named
    assert ("combobox", "Model") in named
    assert ("list", "Predictions") in named
    assert ("button", "What the network sees of red.png, enlarged") in named
    assert page("#status").get_attribute("role") == "status"
    nameless = {role for role, name in named if not name} & {"button", "link", "textbox", "image"}
    assert not nameless


@pytest.mark.parametrize("model", ["hostile", "heads"])
def test_phone(page: Page, server: str, model: str) -> None:
    page.ready(server, model, width=360)
    page.drop((FILE, "image/png", encode(smooth(), "PNG")), BROKEN)
    page.answers(2)
    wide = "return [document.documentElement.scrollWidth, innerWidth]"
    assert page.run(wide) == [360, 360]
    outside = """return [...document.querySelectorAll('main *, header *')].filter((at) => {
      if (at.parentNode.matches('.line')) return false; // cut off with an ellipsis
      const box = at.getBoundingClientRect();
      return box.width > 1 && (box.right > 360.5 || box.left < -0.5);
    }).map((at) => at.outerHTML.slice(0, 80))"""
    assert page.run(outside) == []
    page(".result .input").click()
    assert page.run(outside.replace("main *, header *", "#seen *")) == []


def test_light_and_dark(page: Page, server: str) -> None:
    def luminance(text: str) -> float:
        channels = [int(number) / 255 for number in re.findall(r"\d+", text)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    grounds = []
    for dark in (False, True):
        page.ready(server, dark=dark)
        page.drop(RED_FILE, BROKEN)
        page.answers(2)
        ground = luminance(page(".result").value_of_css_property("background-color"))
        grounds.append(luminance(page("body").value_of_css_property("background-color")))
        for selector in (".label", ".file", ".failed .label", ".time span", "summary", "a"):
            if page.all(selector):
                text = luminance(page(selector).value_of_css_property("color"))
                contrast = (max(text, ground) + 0.05) / (min(text, ground) + 0.05)
                assert contrast >= 4.5, (selector, dark)  # WCAG 2 AA
    assert grounds[0] > 0.8
    assert grounds[1] < 0.05


class Between(http.server.BaseHTTPRequestHandler):
    """A proxy before the server, which is busy for the first predictions."""

    server: Proxy

    def do_GET(self) -> None:
        """What the server says."""
        self.relay()

    def do_POST(self) -> None:
        """503, or what the server says."""
        self.relay()

    def relay(self) -> None:
        """Pass a request on, and its answer back."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "POST":
            self.server.posts.append(time.monotonic())
            if len(self.server.posts) <= self.server.busy:
                return self.say(503, {"Retry-After": "2"}, b'{"error": "busy"}')
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            wanted = {"content-type", "content-security-policy"}
            kept = {name: value for name, value in answer.getheaders() if name.lower() in wanted}
            return self.say(answer.status, kept, answer.read())

    def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        """Answer."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


class Proxy(http.server.ThreadingHTTPServer):
    """See `Between`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, server: str, busy: int = 0, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Between)
        self.upstream = int(server.rpartition(":")[2])
        self.busy = busy
        self.posts: list[float] = []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def end(self) -> None:
        """Refuse connections from now on."""
        self.shutdown()
        self.server_close()


def test_busy_server(page: Page, server: str) -> None:
    proxy = Proxy(server, busy=1)
    page.ready(proxy.address)
    page.drop(RED_FILE, *[png(f"{at}.png", plain(GREEN)) for at in range(3)])
    until(lambda: "Waiting, the server is busy" in page.text("#notice-text"))
    assert page("#notice").is_displayed()
    assert page.texts(".waiting .label") == ["Waiting"] * 4
    assert page.answers(4) == ["red", "green", "green", "green"]
    until(lambda: not page("#notice").is_displayed())
    proxy.end()
    assert len(proxy.posts) == 2
    assert 2 <= proxy.posts[1] - proxy.posts[0] < 4  # Retry-After


def test_server_that_leaves_and_comes_back(page: Page, server: str) -> None:
    proxy = Proxy(server)
    page.ready(proxy.address)
    page.drop(RED_FILE)
    page.answers(1)
    proxy.end()
    page.drop(png("green.png", plain(GREEN)))
    until(lambda: "does not answer" in page.text("#notice-text"))
    assert page.texts(".label > bdi") == ["red"]
    proxy = Proxy(server, port=proxy.server_port)
    page("#notice-button").click()
    assert page.answers(2) == ["green", "red"]
    assert not page("#notice").is_displayed()
    proxy.end()


def test_new_version_while_the_page_is_open(page: Page, tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path / "live.onnx")
    new = tiny_onnx.proto(tiny_onnx.card())
    weights = next(each for each in new.graph.initializer if each.name == "weights")
    weights.CopyFrom(onnx.numpy_helper.from_array(tiny_onnx.weights(3)[:, ::-1].copy(), "weights"))
    (tmp_path / "new.onnx").write_bytes(new.SerializeToString())
    with serving(tmp_path / "log", "--model", path, "--reload", 0.2) as address:
        page.ready(address)
        page.drop(RED_FILE)
        assert page.answers(1) == ["red"]
        before = page.text(".hash")
        (tmp_path / "new.onnx").replace(path)
        card = "return fetch('card').then((reply) => reply.json()).then((card) => card.sha256)"
        until(lambda: page.run(card) != before)
        page.drop(RED_FILE)
        until(lambda: page.answers(2) == ["blue", "blue"])  # what was there is asked again
        assert page.text(".hash") != before
        assert page.text("#card dd:nth-of-type(2)") == "2"


def test_token(page: Page, models: Path, tmp_path: Path) -> None:
    one = models / "colours.onnx"
    with serving(tmp_path / "log", "--model", one, token="sesame") as address:
        page.open(address)
        until(lambda: page("#ask").is_displayed())
        page("#token").send_keys("wrong", Keys.ENTER)
        until(lambda: "did not take" in page.text("#ask-why"))
        page("#token").send_keys("sesame", Keys.ENTER)
        until(lambda: page("#card").get_attribute("aria-busy") == "false")
        page.drop(RED_FILE)
        assert page.answers(1) == ["red"]
        assert "Bearer $TOKEN" in page.text("#curl")
        kept = "return [localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.run(kept) == [0, 0, "", f"{address}/"]
        assert "sesame" not in page.run("return document.documentElement.outerHTML")
        page.open(address)  # a page that was loaded anew knows it no more
        until(lambda: page("#ask").is_displayed())
        page("#token").send_keys(Keys.ESCAPE)
        until(lambda: "nothing is sent without it" in page.text("#notice-text"))
