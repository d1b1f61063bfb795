"""Configs and command lines that nobody means: one line each, in bounded time and memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distcls.batch.options import PredictOptions
from distcls.commands import predict as predict_command
from distcls.commands import train as train_command
from distcls.config import build, flatten, read_yaml
from distcls.config.load import MAX_BYTES, MAX_NODES, options_layer, parse_yaml
from distcls.errors import DistclsError, UsageError
from distcls.export.onnx import ExportOptions, export
from distcls.files import atomic_folder, atomic_path
from distcls.training.config import TrainConfig
from tests.e2e.commands import ROOT, run, start
from tests.e2e.commands import command as command_line

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG_YAML = {
    "laughs": (LAUGHS, "line 6: not valid YAML: more than 100,000 values, aliases unfolded"),
    "laughs as a value": ("lr: " + LAUGHS[3:].partition("\n")[0], "lr: ['x', 'x', 'x', "),
    "in itself": ("a: &a\n  b: *a\n", "an alias to what it is part of"),
    "a list in itself": ("&a [*a]", "an alias to what it is part of"),
    "brackets": ("lr: " + "[" * 3000, "nested deeper than 20 levels"),
    "deep": ("\n".join(" " * n + f"a{n}:" for n in range(40)), "nested deeper than 20 levels"),
    "a date": ("epochs: 2024-13-45", "line 1: not valid YAML: '2024-13-45' is not a value"),
    "digits": ("epochs: " + "9" * 5000, "9' is too large, expected a number below 2^63"),
    "no digits": ("epochs: 0x_", "'0x_' is not a decimal number"),
    "octal": ("epochs: 012", "'012' is not a decimal number; in quotes it is a text"),
    "minutes": ("epochs: 1:30", "'1:30' is not a decimal number"),
    "underscores": ("lr: 1_0.5", "'1_0.5' is not a decimal number"),
    "a tag": ("lr: !!float abc", "'abc' is not a value of its kind"),
    "a tag of a mapping": ("lr: !!map x", "expected a mapping node"),
    "code": ("data: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "twice": ("epochs: 3\nlr: 1\nepochs: 4", "line 3: not valid YAML: the key 'epochs' is there"),
    "a section twice": ("loss:\n  name: a\nloss:\n  name: b", "line 3: not valid YAML: the key 'l"),
    "large": ("data: " + "x" * MAX_BYTES, f"it is larger than {MAX_BYTES:,} bytes"),
    "control characters": ("lr: \x7f", "not valid YAML: "),
    "no mapping": ("[1]", "expected a mapping of keys to values"),
}


@pytest.mark.row(43)
@pytest.mark.parametrize("name", WRONG_YAML)
def test_yaml_of_no_sense_is_one_short_line(name: str, tmp_path: Path) -> None:
    text, expected = WRONG_YAML[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(UsageError) as raised:
        build(TrainConfig, read_yaml(path))
    assert time.monotonic() - began < 5
    said = str(raised.value)
    assert expected in said
    assert len(said) < 600
    assert "\n" not in said


def test_aliases_and_merges_are_understood() -> None:
    text = "x: &x {<<: &w {a: 1}, c: 2}\ny: {<<: *x, b: 3, a: 4}\nz: {<<: [*x, *w]}\n"
    content = parse_yaml(text, "text")
    assert content == {"x": {"a": 1, "c": 2}, "y": {"a": 4, "b": 3, "c": 2}, "z": {"a": 1, "c": 2}}
    assert content == yaml.safe_load(text)
    assert parse_yaml("", "text") == {}
    assert len(parse_yaml("a: [" + "1," * (MAX_NODES - 10) + "]", "text")["a"]) == MAX_NODES - 10


@pytest.mark.row(43)
@settings(max_examples=150, deadline=None)
@given(st.text("ab:{}[],&*! \n-<'\"|>?%0.xe_~#", max_size=60))
def test_any_text_is_a_mapping_or_one_line(text: str) -> None:
    with contextlib.suppress(UsageError):
        content = parse_yaml(text, "text")
        assert repr(content) == repr(yaml.safe_load(text) or {})
        flatten(content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside),
    max_leaves=6,
)
KEYS = [leaf.name for leaf in TrainConfig.__dataclass_fields__.values() if leaf.name != "data"]


@pytest.mark.row(43)
@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
def test_any_value_is_taken_or_one_line(options: dict[str, Any]) -> None:
    with contextlib.suppress(UsageError):
        build(TrainConfig, options_layer(TrainConfig, {"data": "x", **options}))


@pytest.mark.row(43)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--lr", value) for value in ("inf", "nan", "1e400", "0x10", "1_0", "٣", "")),
        *(("--epochs", value) for value in ("1_0", "٣", "9" * 400, "1e3", "inf", "")),
        *(("--collective-timeout", value) for value in ("inf", "nan", "-1")),
        *(("--out", value) for value in ("", "a\0b")),
        *(("--model", value) for value in ("",)),
        *(("--input.size", value) for value in ("1000000000", "100000", "64x", "inf")),
        *(("--augment.crop-padding", value) for value in ("1000000000",)),
        ("--config", ""),
        ("--data", ""),
        ("--seed", "-1"),
    ],
)
def test_a_value_out_of_all_bounds_is_refused(flag: str, value: str) -> None:
    with pytest.raises(UsageError, match=r"is not valid|no file or recipe"):
        train_command.COMMAND.parse(["--data", "x", flag, value])


@pytest.mark.row(45)
@pytest.mark.parametrize("arguments", [[""], ["a", ""], ["a", "--seed", "-1"], ["a", "--out", ""]])
def test_empty_inputs_are_not_the_current_folder(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="is not valid"):
        predict_command.COMMAND.parse([*arguments, "--model", "x.onnx"])


@pytest.mark.row(44)
@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        ({"out": "a.csv", "features": "link.parquet"}, "features"),
        ({"out": "a.csv", "profile": "sub/../a.csv"}, "profile"),
        ({"out": "m.onnx"}, "out"),
        ({"profile": "m.onnx"}, "profile"),
        ({"show": 1, "show_out": "hard.onnx"}, "show_out"),
        ({"out": "names.txt", "classes": "names.txt"}, "out"),
        ({"out": "in.csv"}, "out"),
    ],
)
def test_no_output_is_an_input_or_another_output(
    outputs: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m.onnx", "a.csv", "names.txt", "in.csv"):
        Path(name).write_text(name)
    Path("sub").mkdir()
    Path("link.parquet").symlink_to("a.csv")
    os.link("m.onnx", "hard.onnx")
    plain = {key: Path(each) if isinstance(each, str) else each for key, each in outputs.items()}
    with pytest.raises(UsageError, match=rf"^{named}: .*expected a file other than"):
        PredictOptions(input="in.csv", model="m.onnx", **plain)
    PredictOptions(input="in.csv", model="m.onnx", out=Path("b.csv"), profile=Path("b.png"))


@pytest.mark.row(44)
def test_an_export_does_not_replace_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "best.pth").write_text("weights")
    options = ExportOptions(
        ckpt=tmp_path / "best.pth", out=tmp_path / "." / "best.pth", overwrite=True
    )
    with pytest.raises(UsageError, match="expected a file other than ckpt"):
        export(options)
    assert (tmp_path / "best.pth").read_text() == "weights"


def test_a_name_too_long_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "best.onnx").write_bytes(b"")
    said = run("predict", "a" * 5000, "--model", tmp_path / "best.onnx", code=2).stderr
    assert "File name too long" in said or "no such file" in said
    assert len(said) < 600


@pytest.mark.row(48)
def test_what_kills_leave_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    for name in (".best.pth.abc.part", ".other.pth.abc.part", ".best.pth.d.keep"):
        (tmp_path / name).write_text("left")
    (tmp_path / ".best.pth.folder.part").mkdir()
    with atomic_path(tmp_path / "best.pth") as first:
        with atomic_path(tmp_path / "best.pth") as second:
            assert first.exists()
            second.write_text("second")
        assert first.exists()
        first.write_text("first")
    assert (tmp_path / "best.pth").read_text() == "first"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".best.pth.d.keep", ".other.pth.abc.part", "best.pth"]


@pytest.mark.row(48)
def test_two_write_one_folder_and_one_wins(tmp_path: Path) -> None:
    def write(text: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        with atomic_folder(tmp_path / "data") as folder:
            (folder / "a").write_text(text)
            meanwhile()
            assert (folder / "a").exists()

    with pytest.raises(DistclsError):
        write("first", lambda: write("second"))
    assert (tmp_path / "data" / "a").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_ctrl_c_that_becomes_an_import_error_is_an_interruption() -> None:
    code = """
        import os, signal, time
        from distcls import cli

        def main(arguments):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                while True:
                    time.sleep(0.01)
            except KeyboardInterrupt:
                raise ImportError("initialization failed")

        cli.run(main, [])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")


@pytest.mark.row(48)
def test_an_out_that_is_removed_ends_the_run(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("--model", "simple_nn", "--limit", "60", "--epochs", "100000")
    process = start(command_line("train", "--data", digits, "--out", out, *more), dict(os.environ))
    while not (out / "history.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    out.rename(tmp_path / "elsewhere")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "was removed or replaced while the run was writing it" in said
    assert "Traceback" not in said


@pytest.mark.row(48)
@pytest.mark.slow
def test_workers_end_with_their_launcher(digits: Path, tmp_path: Path) -> None:
    more = ("--model", "simple_nn", "--limit", "60", "--epochs", "100000")
    call = command_line(
        "--data", digits, "--out", tmp_path / "run", *more, module="distcls.train", processes=2
    )
    process = start(call, dict(os.environ), new_session=True)
    while not (tmp_path / "run" / "history.csv").exists():
        assert process.poll() is None
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    for worker in alive:
        worker.kill()
    assert gone
    assert not alive
