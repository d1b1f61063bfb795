"""Config: text to types, YAML and flags together, errors that name key, value, choices and file."""

from __future__ import annotations

import dataclasses
import re
import shlex
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcls.batch.options import PredictOptions
from distcls.commands import completion as completion_command
from distcls.commands import evaluate as evaluate_command
from distcls.commands import export as export_command
from distcls.commands import models as models_command
from distcls.commands import predict as predict_command
from distcls.commands import prepare as prepare_command
from distcls.commands import shipped
from distcls.commands import show as show_command
from distcls.commands import train as train_command
from distcls.commands import triton as triton_command
from distcls.config import Command, build, dump_yaml, flatten, leaves, parse, positional, read_yaml
from distcls.config.load import Given
from distcls.config.schema import convert, sections
from distcls.config.suggest import ELSEWHERE, NO_FLAG, suggestion
from distcls.data.prepare import PrepareOptions
from distcls.errors import UsageError, require
from distcls.evaluation.evaluate import EvaluateOptions
from distcls.export.onnx import ExportOptions
from distcls.files import RECIPES
from distcls.launch import preflight, ray_train, search
from distcls.registry import Registry
from distcls.training.config import OPTIMIZERS, InputConfig, TrainConfig
from distcls.training.resolve import resolved_without_data
from distcls.training.schedule import SCHEDULES

MODULES = (
    *(train_command, show_command, prepare_command, predict_command, evaluate_command),
    *(export_command, models_command, completion_command, search, ray_train, preflight),
)
DESCRIBED = tuple(
    command.COMMAND
    for command in (*MODULES, triton_command, shipped.RECIPES_COMMAND, shipped.TEMPLATES_COMMAND)
)
"""All commands."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Nested."""

    share: float = 0.5
    """A share of 100 %."""
    level: Literal["auto", 1, 2] = "auto"
    """A level."""

    def __post_init__(self) -> None:
        require(0 <= self.share <= 1, "share", self.share, "a share from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Of a small command."""

    source: str = positional()
    """What to read."""
    out: Path
    """Where to write."""
    size: tuple[int, int] | None = None
    """Height and width."""
    names: tuple[str, ...] = ("a", "b")
    """Some names."""
    note: str | None = None
    """Free text."""
    fast: bool = False
    """Hurry."""
    slow_start: bool = True
    """Do not hurry
    at first."""
    inner: Inner = Inner()


def command(*arguments: str) -> Options:
    return parse(Options, arguments, prog="try", about="Try it.", config=True)


def train(*arguments: str) -> TrainConfig:
    given_ = ("--data", "d", "--out", "o", *arguments)
    return parse(TrainConfig, given_, prog="distcls train", about="Train.", config=True)


def message(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        train(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_win_over_yaml_and_the_last_flag_wins(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "epochs: 3\nlr: 1e-2\nmodel:\n  dropout: 0.1\n  stem_stride: 2\n")
    config = train("--config", recipe, "--epochs", "4", "--epochs=5", "--model.dropout", "0.3")
    assert (config.epochs, config.lr, config.model.dropout) == (5, 0.01, 0.3)
    assert config.model.stem_stride == 2
    assert config.batch_size == TrainConfig(data=Path("d"), out=Path("o")).batch_size


def test_later_layers_win_in_build() -> None:
    layers = [{"share": Given(share, "x")} for share in (0.1, 0.2, 0.3)]
    assert build(Inner, *layers) == Inner(share=0.3)


def test_a_flag_can_unset_what_yaml_sets(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "model:\n  pretrained: torchvision\ninput:\n  size: 64\n")
    config = train("--config", recipe, "--model.pretrained=none", "--input.size=null")
    assert config.model.pretrained is None
    assert config.input.size is None


def test_tuples_on_the_command_line() -> None:
    assert train("--input.size", "224").input.size == (224, 224)
    assert train("--input.size", "224x320").input.size == (224, 320)
    assert train("--augment.resized_crop", "0.35,1").augment.resized_crop == (0.35, 1.0)
    assert train("--augment.resized-crop=0.35,1").augment.resized_crop == (0.35, 1.0)


def test_mappings_from_yaml_and_from_text(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "loss:\n  class_weights:\n    fox 1: 2\n    b.c: 0.5\n    7: 1\n")
    weights = train("--config", recipe).loss.class_weights
    assert weights == {"fox 1": 2.0, "b.c": 0.5, "7": 1.0}
    assert train("--loss.class-weights", "fox 1=2, b=c=0.5").loss.class_weights == {
        "fox 1": 2.0,
        "b=c": 0.5,
    }
    # the last place wins as a whole
    for flag, value in (("balanced", "balanced"), ("1,2", (1.0, 2.0)), ("none", None)):
        given_ = ("--config", recipe, "--loss.class_weights", flag)
        assert train(*given_).loss.class_weights == value
    recipe = yaml_file(tmp_path, "loss:\n  class_weights:\n    cat: many\n")
    text = message("--config", recipe)
    assert text.startswith(f"{recipe}: loss.class_weights: {{'cat': 'many'}} is not valid")
    assert "names with a value each, such as a=1,b=2" in text


def test_boolean_flags() -> None:
    base = ("source", "--out", "o")
    assert command(*base).fast is False
    assert command(*base, "--fast").fast is True
    assert command(*base, "--fast=false").fast is False
    assert command(*base, "--fast", "no").fast is False
    assert command(*base, "--slow-start", "off").slow_start is False
    assert command(*base, "--slow_start=off").slow_start is False


def test_a_boolean_flag_does_not_swallow_the_argument_after_it() -> None:
    config = command("--out", "o", "--fast", "source")
    assert config.fast is True
    assert config.source == "source"


def test_a_negative_number_is_a_value() -> None:
    assert "lr: -0.5 is not valid" in message("--lr", "-0.5")


def test_unknown_flag_suggests_the_right_one() -> None:
    text = message("--model.nmae", "x")
    assert "'--model.nmae'" in text
    assert "did you mean '--model'" in text
    assert "distcls train --help" in text


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--weight-decay", "; did you mean '--optimizer.weight-decay'?"),
        ("--flips", "; did you mean '--augment.flip'?"),
        ("--patience", " (choices: --schedule.patience, --monitor.patience)"),
        ("--checkpoint", "--checkpoint."),
        ("--modle", "; did you mean '--model'?"),
        ("--optimiser", "; did you mean '--optimizer'?"),
        ("--shedule", "; did you mean '--schedule'?"),
        ("--scheduler.name", "; did you mean '--schedule'?"),
        ("--augmnet", " (choices: --augment.flip, --augment.crop-padding, "),
        ("--ema", "; did you mean '--ema.decay'?"),
        ("--epohcs", "; did you mean '--epochs'?"),
        ("--learningrate", "; did you mean '--lr'?"),
        ("--weight_deacy", "; did you mean '--optimizer.weight-decay'?"),
        ("--optimizer.momentun", "; did you mean '--optimizer.momentum'?"),
        ("--model.label_smoothing", "; did you mean '--loss.label-smoothing'?"),
        ("--optimizer.foo", " (choices: --optimizer, --optimizer.weight-decay, "),
        ("--size", "; did you mean '--input.size'?"),
        ("--feature", "; see "),
        ("--yaml", "; see "),
        ("--nbs", "; see "),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag: str, hint: str) -> None:
    text = message(flag, "3")
    assert f"'{flag}'{hint}" in text if hint[0] != "-" else hint in text
    assert text.count("--") <= 8


FLAGS = [
    {leaf.key: "--" + leaf.key.removesuffix(".name").replace("_", "-") for leaf in leaves(cls)}
    for cls in (
        *(TrainConfig, PrepareOptions, PredictOptions, EvaluateOptions, ExportOptions),
        *(show_command.ShowConfig, models_command.ModelsOptions),
    )
]
"""Of each command, the flag of each key as its help lists it."""


def test_a_flag_of_other_training_scripts_names_ours() -> None:
    used = set()
    for flags in FLAGS:
        for word in {word for words in ELSEWHERE.values() for word in words}:
            meant = [key for key, words in ELSEWHERE.items() if word in words and key in flags]
            if meant and word.replace("-", "_") not in flags:
                assert suggestion(f"--{word}", flags) == f"; did you mean {flags[meant[0]]!r}?"
                used.add((meant[0], word))
    assert used == {(key, word) for key, words in ELSEWHERE.items() for word in words}


@pytest.mark.parametrize("word", NO_FLAG)
def test_a_flag_that_distcls_does_without_says_what_to_do(word: str) -> None:
    said = {suggestion(f"--{word}", flags) for flags in FLAGS}
    assert said >= {f"; {NO_FLAG[word]}"}
    assert all(text.startswith(("; did you mean '--", f"; {NO_FLAG[word]}")) for text in said)


def test_the_device_is_no_flag_of_training(tmp_path: Path) -> None:
    text = message("--device", "cuda")
    assert "accelerate launch" in text
    assert "CUDA_VISIBLE_DEVICES" in text
    with pytest.raises(UsageError, match="did you mean '--provider'"):
        predict_command.COMMAND.parse(["photos", "--model", "m.onnx", "--device", "cuda"])


@pytest.mark.parametrize(
    ("key", "ours"),
    [("learning_rate", "lr"), ("optimizer.lr", "lr"), ("model.weights", "model.pretrained")],
)
def test_a_key_of_other_training_scripts_names_ours(tmp_path: Path, key: str, ours: str) -> None:
    recipe = yaml_file(tmp_path, f"{key}: 0.1\n")
    assert message("--config", recipe) == (f"{recipe}: unknown key {key!r}; did you mean {ours!r}?")


def test_a_section_with_a_name_takes_it_directly() -> None:
    config = train("--model", "simple_cnn", "--optimizer=sgd", "--loss", "focal")
    assert (config.model.name, config.optimizer.name) == ("simple_cnn", "sgd")
    assert config.loss.name == "focal"


def test_a_positional_argument_may_have_the_flag_that_other_commands_have() -> None:
    assert command("--source", "photos", "--out", "x").source == "photos"
    assert command("--source=photos", "--out", "x").source == "photos"


def test_what_follows_two_hyphens_is_no_flag() -> None:
    config = command("--out", "o", "--fast", "--", "--slow_start")
    assert (config.source, config.fast, config.slow_start) == ("--slow_start", True, True)
    inputs = ["--model", "m", "--quiet", "--", "-a.jpg", "--quiet"]
    assert predict_command.COMMAND.parse(inputs).input == ("-a.jpg", "--quiet")


def test_flags_may_not_be_abbreviated() -> None:
    assert "'--epoch'; did you mean '--epochs'" in message("--epoch", "3")


def test_unknown_key_names_the_file_and_suggests(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "optimizer:\n  weight_decai: 0.1\n")
    text = message("--config", recipe)
    assert text.startswith(recipe)
    assert "unknown key 'optimizer.weight_decai'" in text
    assert "did you mean 'optimizer.weight_decay'" in text


@pytest.mark.parametrize("value", ["", " 18"])
def test_a_section_without_keys(tmp_path: Path, value: str) -> None:
    text = message("--config", yaml_file(tmp_path, f"model:{value}\n"))
    assert "'model' is a section with the keys" in text
    assert "model.name" in text


def test_a_section_may_be_its_name_alone(tmp_path: Path) -> None:
    short = yaml_file(tmp_path, "model: simple_cnn\noptimizer: sgd\nschedule: step\nloss: focal\n")
    config = train("--config", short)
    names = [getattr(config, key).name for key in ("model", "optimizer", "schedule", "loss")]
    assert names == ["simple_cnn", "sgd", "step", "focal"]
    assert train("--config", short, "--model", "resnet18").model.name == "resnet18"
    both = yaml_file(tmp_path, "model: simple_cnn\nmodel.name: resnet18\n")
    assert message("--config", both) == (
        f"{both}: model and model.name are the same key; give one of the two"
    )
    with pytest.raises(UsageError, match="'ema' is a section with the keys"):
        train("--config", yaml_file(tmp_path, "ema: on\n"))


def test_wrong_type_names_place_key_value_and_type(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "epochs: many\n")
    assert message("--config", recipe) == (
        f"{recipe}: epochs: 'many' is not valid, expected an integer or one of auto"
    )
    assert message("--epochs", "2.5") == (
        "command line: epochs: '2.5' is not valid, expected an integer or one of auto"
    )


def test_wrong_choice_names_the_choices() -> None:
    text = message("--loader.pack", "maybe")
    assert text == "command line: loader.pack: 'maybe' is not valid, expected one of auto, on, off"


def test_bad_value_of_a_nested_key_names_the_full_key(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "model:\n  dropout: 1.5\n")
    text = message("--config", recipe)
    assert text.startswith(f"{recipe}: model.dropout: 1.5 is not valid, expected ")
    text = message("--monitor.metric", "accuracy")
    assert text.startswith("command line: monitor.metric: 'accuracy' is not valid")
    assert "top1" in text
    assert "macro_f1" in text


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--input.size", "0"),
        ("--input.size", "32x-1"),
        ("--input.crop_fraction", "0"),
        ("--input.crop_fraction", "1.5"),
        ("--augment.flip", "1.1"),
        ("--augment.erase", "nan"),
        ("--augment.resized_crop", "0.5,0.2"),
        ("--augment.rotate", "181"),
        ("--epochs", "0"),
        ("--seed", "-1"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--loader.workers", "0"),
        ("--augment.randaugment_magnitude", "31"),
        ("--augment.mixup", "-1"),
        ("--loss.focal_gamma", "-1"),
        ("--distill.temperature", "2"),
        ("--loss.class_weights", "cat=two"),
        ("--loss.class_weights", "cat=-2"),
        ("--ema.decay", "1"),
        ("--schedule.warmup", "100"),
        ("--schedule.warmup", "3 weeks"),
    ],
)
def test_bad_values_are_found_at_construction(flag: str, value: str) -> None:
    assert message(flag + "=" + value).startswith(f"command line: {flag[2:]}: ")


def test_crop_padding_and_resized_crop_exclude_each_other() -> None:
    text = message("--augment.crop_padding", "4", "--augment.resized_crop", "0.5,1")
    assert text.startswith("command line: augment.crop_padding: 4")


def test_missing_key_says_how_to_give_it(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "epochs: 3\n")
    with pytest.raises(UsageError, match=r"data is missing; give it as --data or in .*recipe.yaml"):
        parse(TrainConfig, ["--config", recipe], prog="x", about="", config=True)
    with pytest.raises(UsageError, match=r"^out is missing; give it as --out$"):
        command("source")
    with pytest.raises(UsageError, match="SOURCE"):
        command("--out", "o")


@pytest.mark.parametrize("name", RECIPES.paths())
def test_a_recipe_is_found_by_its_name(name: str, in_a_folder: Path) -> None:
    found = train_command.COMMAND.parse(["--config", name, "--data", "d"])
    path = str(RECIPES.folder / f"{name}.yaml")
    assert found == train_command.COMMAND.parse(["--config", path, "--data", "d"])
    assert found != train_command.COMMAND.parse(["--data", "d"])


def test_a_recipe_is_named_beside_a_file(in_a_folder: Path) -> None:
    Path("mine.yaml").write_text("epochs: 2\n")
    files = ["--config", "digits", "--config", "mine.yaml"]
    found = train_command.COMMAND.parse([*files, "--data", "d"])
    assert (found.epochs, found.monitor.metric) == (2, "loss")


def test_a_file_comes_before_the_recipe_of_its_name(in_a_folder: Path) -> None:
    Path("digits").mkdir()
    recipe = train_command.COMMAND.parse(["--config", "digits", "--data", "d"])
    assert recipe.epochs == 30
    Path("digits").rmdir()
    Path("digits").write_text("epochs: 2\n")
    assert train_command.COMMAND.parse(["--config", "digits", "--data", "d"]).epochs == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "digts",
            "no file or recipe is called 'digts'; did you mean 'digits'? "
            "(choices: captcha, digits, fashion_mnist)",
        ),
        ("mine.yaml", "cannot read config mine.yaml: No such file or directory"),
        (
            "configs/digits.yaml",
            "cannot read config configs/digits.yaml: no such file; digits is the recipe that "
            "comes with distcls",
        ),
    ],
)
def test_a_config_that_is_not_there(in_a_folder: Path, name: str, expected: str) -> None:
    assert message("--config", name) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "not valid YAML"),
        ("\tepochs: 3", "line 1: not valid YAML"),
        ("- epochs", "expected a mapping of keys to values"),
        ("just text", "expected a mapping of keys to values"),
    ],
)
def test_yaml_that_is_none(tmp_path: Path, content: str, expected: str) -> None:
    text = message("--config", yaml_file(tmp_path, content))
    assert expected in text
    assert "recipe.yaml" in text


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in message("--config", str(tmp_path / "none.yaml"))
    assert "directory" in message("--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"out: \xe9\n")
    assert "latin.yaml" in message("--config", str(tmp_path / "latin.yaml"))


def test_an_empty_yaml_changes_nothing(tmp_path: Path) -> None:
    assert train("--config", yaml_file(tmp_path, "# nothing yet\n")) == train()


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": {}}) == {"a.b.c": 1, "a.d": [2]}


def test_leaves_are_the_fields_in_order_with_type_default_and_doc() -> None:
    found = {leaf.key: leaf for leaf in leaves(Options)}
    order = ["source", "out", "size", "names", "note", "fast", "slow_start"]
    assert list(found) == [*order, "inner.share", "inner.level"]
    assert found["source"].positional
    assert found["out"].default is dataclasses.MISSING
    assert found["inner.share"].default == 0.5
    assert found["slow_start"].doc == "Do not hurry at first."


def shown(capsys: pytest.CaptureFixture[str], described: Command[Any]) -> str:
    with pytest.raises(SystemExit) as left:
        described.parse(["--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("described", DESCRIBED, ids=lambda each: each.prog)
def test_help_lists_each_option_once_with_its_words(
    capsys: pytest.CaptureFixture[str], described: Command[Any]
) -> None:
    text = shown(capsys, described)
    letters = "".join(text.split())
    listed = re.findall(r"^  (?:-h, )?(--[a-z][\w.-]*|[A-Z]+)\b", text, re.M)
    assert len(listed) == len(set(listed))
    fields = leaves(described.options)
    flags = [flag for flag, _, _ in described.flags()]
    assert set(listed) == {*flags, *(leaf.key.upper() for leaf in fields if leaf.positional)}
    for leaf in fields:
        assert leaf.doc, f"{leaf.key} has no docstring"
        assert "".join(leaf.doc.split()) in letters
    assert "_" not in "".join(listed)
    assert " V\n" not in text


def test_the_help_of_train_begins_with_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, train_command.COMMAND)
    groups = re.findall(r"^(\S.*):\n((?:(?: .*)?\n)+)", text, re.M)
    flags = {title: re.findall(r"^  (--[\w.-]+)", lines, re.M) for title, lines in groups}
    assert flags["essential options"] == [
        *("--data", "--out", "--epochs", "--batch-size", "--lr", "--model", "--model.pretrained"),
        *("--input.size", "--precision", "--resume", "--seed", "--config"),
    ]
    for section, about in sections(TrainConfig).items():
        assert "".join(about.split()) in "".join(text.split())
        inside = [f"--{section}.", f"--{section}"]
        assert all(flag.startswith(tuple(inside)) for flag in flags[section])
    assert "--optimizer" in flags["optimizer"]
    order = [title for title, _ in groups]
    assert order.index("essential options") < order.index("other options") < order.index("model")


def test_help_says_the_type_the_default_and_what_is_required(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = " ".join(shown(capsys, train_command.COMMAND).split())
    assert "usage: distcls train --data PATH " in text
    for part in (
        "--data PATH Dataset directory",
        "with default options. [required]",
        "--epochs INT|auto Passes",
        "--precision {auto,fp32,bf16,fp16} Mixed",
        "--limit INT Train",
        "--optimizer.clip-norm FLOAT|none Gradient",
        "--monitor.patience INT|auto|none Early",
        "--loss.class-weights FLOAT,...|NAME=FLOAT,...|balanced Weight",
        "--compile [true|false] Compile",
        "dropout. [default: 0]",
        "blocking it. [default: 600]",
        "best so far. [default: true]",
        "--model TEXT Architecture",
    ):
        assert part in text
    for module, usage in (
        (predict_command, "distcls predict INPUT ... --model TEXT [options]"),
        (models_command, "distcls models [PATTERN] [options]"),
        (show_command, "distcls show DATA [--config FILE ...] [options]"),
    ):
        assert f"usage: {usage}\n" in shown(capsys, module.COMMAND)


@pytest.mark.parametrize("described", DESCRIBED, ids=lambda each: each.prog)
def test_the_groups_and_examples_of_help_fit_the_options(described: Command[Any]) -> None:
    keys = {leaf.key for leaf in leaves(described.options)}
    assert {key for named in described.groups.values() for key in named} <= keys
    assert described.examples
    for example in described.examples:
        _, found, arguments = example.partition(described.prog.removeprefix("python ") + " ")
        words = shlex.split(arguments, comments=True)
        if ">" in words:
            words = words[: words.index(">")]
        assert found
        described.parse([word for word in words if word != "--print-config"])


def test_none_stands_for_null_unless_it_is_a_choice() -> None:
    none_or_own = Literal["none", "some"] | None
    assert convert("none", none_or_own) == "none"
    assert convert("null", none_or_own) is None
    for word in ("none", "None", "null"):
        assert train("--optimizer.clip-norm", word).optimizer.clip_norm is None
        assert train("--monitor.patience", word).monitor.patience is None
    assert train("--resume", "none").resume == "none"


def test_configs_compose_and_the_later_wins_key_by_key(tmp_path: Path) -> None:
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text("epochs: 3\nlr: 0.1\noptimizer: {name: sgd, momentum: 0.8}\n")
    mine.write_text("lr: 0.2\noptimizer: {momentum: 0.5}\n")
    config = train("--config", str(base), "--lr", "0.3", "--config", str(mine))
    assert (config.epochs, config.lr) == (3, 0.3)
    assert (config.optimizer.name, config.optimizer.momentum) == ("sgd", 0.5)
    assert train("--config", str(mine), "--config", str(base)).optimizer.momentum == 0.8


@pytest.mark.parametrize("wrong", ["epochs: many", "epohcs: 3", "epochs: 0", "a: [1"])
@pytest.mark.parametrize("last", [True, False])
def test_an_error_in_one_of_several_configs_names_that_file(
    tmp_path: Path, wrong: str, last: bool
) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("lr: 0.1\n")
    bad.write_text(wrong + "\n")
    files = [good, bad] if last else [bad, good]
    text = message(*(f"--config={path}" for path in files))
    assert "bad.yaml" in text
    assert "good.yaml" not in text


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        train_command.main(arguments)
    assert left.value.code == 0
    text, errors = capsys.readouterr()
    assert not errors
    return text


def test_print_config_prints_what_is_known_without_images_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("epochs: 60\nmodel: {pretrained: null}\n")
    flags = ["--data", "nowhere", "--config", "mine.yaml", "--optimizer", "sgd"]
    text = printed(capsys, *flags, "--batch-size", "32", "--print-config")
    Path("printed.yaml").write_text(text)
    known = {key: value for key, (value, _) in read_yaml(Path("printed.yaml")).items()}
    assert set(known) == {leaf.key for leaf in leaves(TrainConfig)}
    assert (known["optimizer.momentum"], known["optimizer.weight_decay"]) == (0.9, 1e-4)
    assert (known["schedule.warmup"], known["monitor.mode"]) == ("5%", "max")
    assert (known["monitor.patience"], known["lr"]) == (20, 0.0005)
    assert known["optimizer.head_lr_scale"] == 1.0
    assert known["augment.flip"] == "auto"
    assert known["input.size"] is None
    assert printed(capsys, "--config", "printed.yaml", "--print-config") == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "printed.yaml"]


def test_print_config_needs_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, "--epochs", "3", "--print-config")
    Path("mine.yaml").write_text(text)
    assert "data" not in read_yaml(Path("mine.yaml"))
    with pytest.raises(UsageError, match=r"data is missing; give it as --data or in mine\.yaml"):
        train_command.main(["--config", "mine.yaml"])
    again = printed(capsys, "--config", "mine.yaml", "--data", "d", "--print-config")
    assert again == "data: d\n" + text


def test_print_config_refuses_what_a_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="unknown model 'resnet_18'"):
        train_command.main(["--data", "d", "--model", "resnet_18", "--print-config"])
    with pytest.raises(UsageError, match=r"optimizer\.momentum: 0\.9 is not valid"):
        train_command.main(["--data", "d", "--optimizer.momentum", "0.9", "--print-config"])


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation, of any size that keeps the checks of TrainConfig content."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return st.one_of([values(member) for member in typing.get_args(kind)])
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        items = [values(item) for item in typing.get_args(kind) if item is not ...]
        return st.tuples(*items).map(sorted).map(tuple)
    if typing.get_origin(kind) is dict:
        return st.dictionaries(
            st.sampled_from(["a", "b.c", "1", "no", "null", "ü = 2"]),
            values(typing.get_args(kind)[1]),
            min_size=1,
        )
    # no path holds NUL; U+0085, a line break of old mainframes, is one thing PyYAML folds
    letters = st.characters(exclude_categories=("Cs",), exclude_characters="\0\x85")
    text = st.text(letters, min_size=1).filter(lambda word: word.lower() not in ("none", "null"))
    return {
        int: st.integers(1, 2**62),
        float: st.floats(0, 1, exclude_min=True, exclude_max=True),
        bool: st.booleans(),
        str: text,
        Path: text.map(Path),
        type(None): st.none(),
    }[kind]


def unread(registry: Registry[Any], name: str) -> set[str]:
    """Options that the optimiser or schedule of that name does not read, and others do."""
    options = {key for other in registry.names() for key in registry.find(other).defaults}
    return options - registry.find(name).defaults.keys()


SPECIAL = {
    "schedule.warmup": st.sampled_from(["5%", "12.5 %", "100 steps", "1 epoch", "0.5 epochs"]),
    "monitor.metric": st.sampled_from(["top1", "loss", "macro_f1"]),
    "model.pretrained": st.sampled_from(["auto", "library", "0"]),
    "model.pretrained_sha256": st.sampled_from([None, "0" * 64, "e" * 64]),
    "input.background": st.sampled_from([None, "ignore", (0, 128, 255)]),
    "augment.crop_padding": st.just(0),
    "augment.color_jitter": st.none() | st.tuples(*[st.floats(0, 2)] * 3, st.floats(0, 0.5)),
    # these belong to one choice alone
    "augment.policy": st.just("randaugment"),
    "threads": st.none() | st.integers(1, 4096),
    "input.size": st.none() | st.tuples(st.integers(1, 8192), st.integers(1, 8192)),
    "augment.randaugment_ops": st.integers(1, 14),
    "augment.randaugment_magnitude": st.integers(0, 30),
    "loss.name": st.just("focal"),
    "distill.teacher": st.just(Path("teacher.pth")),
    "checkpoint.filename": st.sampled_from(
        ["{model}_{epoch}.pth", "{metric}_{score:.3f}@{step}.pth"]
    ),
    "average.last_epochs": st.none(),  # excludes an average by decay
    # these belong to other optimisers and schedules than the default ones
    "optimizer.name": st.just("adamw"),
    "schedule.name": st.just("cosine"),
    "freeze.backbone": st.sampled_from([None, "2 epochs", "10%"]),
    **{f"optimizer.{key}": st.none() for key in unread(OPTIMIZERS, "adamw")},
    **{f"schedule.{key}": st.none() for key in unread(SCHEDULES, "cosine")},
}


@settings(max_examples=30, deadline=None)
@given(
    st.fixed_dictionaries(
        {leaf.key: SPECIAL.get(leaf.key, values(leaf.type)) for leaf in leaves(TrainConfig)}
    )
)
def test_a_config_written_as_yaml_reads_back_equal(chosen: dict[str, Any]) -> None:
    config = build(TrainConfig, {key: Given(value, "here") for key, value in chosen.items()})
    again = read_back(config)
    assert again == config
    assert dump_yaml(again) == dump_yaml(config)


def read_back(config: TrainConfig) -> TrainConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(dump_yaml(config), encoding="utf-8")
        return build(TrainConfig, read_yaml(path))


@pytest.mark.parametrize("text", ["64x", "x64", "64x64x64", "64xx64"])
def test_half_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"input.size: {text!r} is not valid")):
        build(TrainConfig, {k: Given(v, "f") for k, v in {"data": "d", "input.size": text}.items()})


def test_sizes_as_they_are_written() -> None:
    for text in (
        "192x256",
        "192, 256",
        "(192, 256)",
        "192 x 256",
        "[192,256]",
        "192 256",
        "192,256,",
    ):
        assert InputConfig(size=convert(text, tuple[int, int])).size == (192, 256)


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("optimizer.name", "AdamW", "adamw"),
        *[("monitor.metric", word, "top1") for word in ("accuracy", "acc", "val_accuracy")],
        *[("loss.name", word, "cross_entropy") for word in ("crossentropy", "CrossEntropyLoss")],
        ("loss.name", "sparse_categorical_crossentropy", "cross_entropy"),
        *[("precision", "16-mixed", "fp16"), ("precision", "bf16-mixed", "bf16")],
        ("precision", "FP16", "fp16"),
    ],
)
def test_other_frameworks_words_lead_to_ours(key: str, value: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{meant}'"):
        resolved_without_data(TrainConfig.from_yaml("digits", **{"data": "d", key: value}))


def test_there_is_no_option_for_stochastic_depth() -> None:
    with pytest.raises(UsageError, match=r"--drop-path'; stochastic depth is .* no option") as told:
        train_command.COMMAND.parse(["--data=d", "--drop-path", "0.1"])
    assert "choices" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"nosuch": 1}, "TrainConfig: unknown key 'nosuch'"),
        ({"epoch": 1, "data": "d"}, "unknown key 'epoch'; did you mean 'epochs'"),
        ({}, "TrainConfig: data is missing"),
        ({"data": "d", "threads": 10**6}, "threads: 1000000 is not valid, expected 1 to 4,096"),
        ({"data": "d", "collective_timeout": 1e300}, "collective_timeout: 1e.300 is not valid"),
        ({"data": "d", "collective_timeout": float("inf")}, "collective_timeout: inf is not valid"),
        ({"data": "d", "lr": float("inf")}, "lr: inf is not valid"),
    ],
)
def test_what_python_code_gives_wrong_is_told(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        TrainConfig(**options)
