"""How commands end: the exit code, one line for a user's mistake, a traceback for ours."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from distcls.cli import COMMANDS, EXTRAS, dispatch, load_command
from distcls.files import RECIPES, TEMPLATES, Shipped

HEAD = """
import sys, time
from distcls.cli import run
from distcls.errors import BadImage, BadValue, DistclsError, Stopped, UsageError

def main(arguments):
    {body}

run(main)
"""


def call_main(body: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEAD.format(body=body), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def distcls(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distcls", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=folder,
    )


def test_done_is_nought_and_arguments_arrive() -> None:
    result = call_main("print('|'.join(arguments))", "a b", "--c")
    assert (result.returncode, result.stdout, result.stderr) == (0, "a b|--c\n", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("DistclsError('the disk is full')", 1, "error: the disk is full"),
        ("UsageError('no such folder')", 2, "error: no such folder"),
        ("BadValue('lr', -1, 'more')", 2, "error: lr: -1 is not valid, expected more"),
        ("BadImage('truncated')", 1, "error: truncated"),
        ("Stopped('saved; resume it')", 75, "saved; resume it"),
    ],
)
def test_errors_for_the_user_are_one_line_and_a_code(error: str, code: int, line: str) -> None:
    result = call_main(f"raise {error}")
    assert (result.returncode, result.stdout, result.stderr) == (code, "", line + "\n")


def test_another_process_says_which_it_is() -> None:
    result = call_main("raise UsageError('no')", RANK="3", WORLD_SIZE="4")
    assert (result.returncode, result.stderr) == (2, "[rank 3] error: no\n")


def test_a_bug_keeps_its_traceback() -> None:
    result = call_main("{}['missing']")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert "KeyError: 'missing'" in result.stderr


def test_ctrl_c() -> None:
    # a shell's background jobs, and what they start, begin with Ctrl-C ignored
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    body = f"{heard}; print('ready', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", HEAD.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert (child.returncode, errors) == (130, "error: interrupted\n")


def test_a_reader_that_leaves_is_no_traceback() -> None:
    body = "[print('x' * 1000) for _ in range(1000)]"
    with subprocess.Popen(
        [sys.executable, "-c", HEAD.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr is not None
        assert child.stderr.read() == ""
        assert child.wait(30) == 1


def test_a_result_that_cannot_be_written_is_not_success() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", HEAD.format(body="print('result')")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert result.returncode != 0
    assert "No space left" in result.stderr


def test_the_command_without_arguments_helps() -> None:
    result = distcls()
    assert result.returncode == 0
    assert result.stdout.startswith("usage: distcls COMMAND")
    assert distcls("--help").stdout == result.stdout
    for name in ("train", "evaluate", "export", "predict", "recipes", "templates", "completion"):
        assert f"  {name} " in result.stdout
    assert distcls("help").stdout == distcls("help", "--help").stdout == result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = distcls("help", name)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: distcls {name} ")
    assert f"\nexamples:\n  distcls {name} " in result.stdout
    for words in ([name, "--help"], ["--help", name]):
        with contextlib.suppress(SystemExit):
            dispatch(words)
        assert capsys.readouterr().out == result.stdout


def test_help_of_an_unknown_command() -> None:
    result = distcls("help", "trian")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown command 'trian'; did you mean 'train'?")


def test_an_unknown_command_is_suggested_the_right_one() -> None:
    result = distcls("pedict")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown command 'pedict'; did you mean 'predict'?")
    assert result.stderr.count("\n") == 1


def test_a_mistake_in_a_config_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: d\nout: o\nlearning_rate: 0.1\n")
    result = distcls("train", "--config", "recipe.yaml", folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: recipe.yaml: unknown key 'learning_rate'")
    assert result.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_version() -> None:
    from distcls import __version__

    for flag in ("--version", "-V"):
        result = distcls(flag)
        assert (result.returncode, result.stdout) == (0, f"distcls {__version__}\n")


def test_print_config_in_a_pipe(tmp_path: Path) -> None:
    result = distcls("train", "--data", "d", "--epochs", "3", "--print-config", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert yaml.safe_load(result.stdout)["epochs"] == 3
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the completion of each shell, made where torch is not installed."""
    folder = tmp_path_factory.mktemp("completion")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from distcls.cli import dispatch\n"
        "dispatch(['completion', sys.argv[1]])"
    )
    for shell in ("bash", "zsh", "fish"):
        call = [sys.executable, "-c", program, shell]
        done = subprocess.run(call, check=True, capture_output=True, text=True)
        (folder / f"distcls.{shell}").write_text(done.stdout)
    return folder


LINES = {
    "pre": {"prepare", "predict"},
    "train --model.pretrained-": {"--model.pretrained-match", "--model.pretrained-sha256"},
    "train --precision ": {"auto", "fp32", "bf16", "fp16"},
    "predict --out-format j": {"jsonl"},
    "evaluate --mod": {"--model"},
    "train --print": {"--print-config"},
    "completion z": {"zsh"},
    "recipes f": {"fashion_mnist"},
    "templates two_c": {"two_cpu_processes"},
    "train --config di": {"digits", "distcls.bash", "distcls.fish", "distcls.zsh"},
    "help ev": {"evaluate"},
    "predict --quiet x": set(),
}
"""What completes the beginnings of command lines."""


@pytest.mark.parametrize("line", LINES)
def test_completion_in_bash(scripts: Path, line: str) -> None:
    program = (
        "source distcls.bash; complete -p distcls\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _distcls\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    call = ["bash", "--norc", "-c", program, "bash", "distcls", *line.split(" ")]
    done = subprocess.run(call, cwd=scripts, capture_output=True, text=True, check=False)
    first, *found = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert first.endswith("-F _distcls distcls")
    assert set(filter(None, found)) == LINES[line]


def test_completion_in_bash_of_a_value_after_an_equals_sign(scripts: Path) -> None:
    program = "source distcls.bash; COMP_CWORD=4; COMP_WORDS=(distcls train --precision = b)"
    call = ["bash", "--norc", "-c", f'{program}; _distcls; echo "${{COMPREPLY[*]}}"']
    done = subprocess.run(call, cwd=scripts, capture_output=True, text=True, check=True)
    assert done.stdout == "bf16\n"


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize("line", LINES)
def test_completion_in_fish(scripts: Path, line: str) -> None:
    program = 'source distcls.fish; complete -C "distcls $argv[1]"'
    call = ["fish", "--no-config", "-c", program, line]
    done = subprocess.run(call, cwd=scripts, capture_output=True, text=True, check=True)
    assert {found.partition("\t")[0] for found in done.stdout.splitlines()} == LINES[line]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_completion_for_zsh_parses(scripts: Path) -> None:
    subprocess.run(["zsh", "-f", "-n", "distcls.zsh"], cwd=scripts, check=True)


def test_completion_knows_every_flag_of_help(scripts: Path) -> None:
    texts = [(scripts / f"distcls.{shell}").read_text() for shell in ("bash", "zsh", "fish")]
    for name in COMMANDS:
        assert all(name in text for text in texts)
        for flag, _, _ in load_command(name).COMMAND.flags():
            assert all(flag[2:] in text for text in texts)


USERS = """
import importlib
from distcls.cli import COMMANDS, load_command

mains = [load_command(name).main for name in COMMANDS]
for name in ("launch.search", "launch.preflight", "launch.ray_train"):
    mains.append(importlib.import_module("distcls." + name).main)
for main in mains:
    try:
        main(["--help"])
    except SystemExit as left:
        assert left.code == 0, left
print(len(mains), "helped")
"""


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("here", ("export.py", "launch/__init__.py")),
        ("packages", ("export/__init__.py", "launch.py")),
    ],
)
def test_a_users_own_export_and_launch_are_not_ours(
    place: str, names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the current folder, and installed (`pip install launch`), each a file or a folder."""
    here = tmp_path / "here"
    here.mkdir()
    for name in names:
        path = tmp_path / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('the wrong one')\n")
    root = Path(__file__).parent.parent
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / place}{os.pathsep}{root}")
    call = [sys.executable, "-c", USERS]
    done = subprocess.run(call, capture_output=True, text=True, cwd=here, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"\n{len(COMMANDS) + 3} helped\n")
    result = distcls("export", "--ckpt", "missing.pth", "--quiet", folder=here)
    assert (result.returncode, result.stderr) == (2, "error: ckpt: missing.pth does not exist\n")


@pytest.mark.parametrize(("command", "files"), [("recipes", RECIPES), ("templates", TEMPLATES)])
def test_files_that_come_with_distcls(command: str, files: Shipped, tmp_path: Path) -> None:
    listed = distcls(command, folder=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(files.paths())
    for line, path in zip(listed, files.paths().values(), strict=True):
        about = line.split(maxsplit=1)[1]
        assert f"# {about}\n" in path.read_text()
        assert len(line) <= 100
    for name in (path.stem, path.name):
        assert distcls(command, name, folder=tmp_path).stdout == path.read_text()


def test_an_unknown_recipe_or_template() -> None:
    result = distcls("templates", "one-gpu")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: no template is called 'one-gpu'; did you mean 'one_gpu'?\n"
    names = [*TEMPLATES.paths()]
    assert distcls("templates", "xyzzy").stderr == "error: no template is called 'xyzzy' " + (
        f"(choices: {', '.join(names[:12])}, ...)\n"
    )


def test_a_missing_package_is_named_with_its_extra() -> None:
    result = call_main("sys.modules['optuna'] = None; import optuna")
    assert result.returncode == 2
    assert result.stderr == (
        'error: this needs optuna, which is not installed; pip install "distcls[search]"\n'
    )
    assert "Traceback" in call_main("import no_such_package_of_ours").stderr


def test_the_extras_hold_the_packages_that_they_are_named_for() -> None:
    content = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    extras = content["project"]["optional-dependencies"]
    names = importlib.metadata.packages_distributions()
    for package, extra in EXTRAS.items():
        wanted = {re.split(r"[\[<>=]", text)[0].lower() for text in extras[extra]}
        assert wanted & {name.lower() for name in names.get(package, [package])}, package


def test_help_answers_at_once() -> None:
    """Its own share: start-up of Python aside, it takes a few milliseconds."""
    program = (
        "import sys, time; began = time.process_time()\n"
        "from distcls.cli import dispatch\n"
        "dispatch(['--help']); sys.exit(time.process_time() - began > 0.05)"
    )
    tries = [subprocess.run([sys.executable, "-c", program], check=False) for _ in range(3)]
    assert any(done.returncode == 0 for done in tries)
