"""Config: text to types, YAML and flags together, errors that name key, value, choices and file."""

from __future__ import annotations

import dataclasses
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcls.config import build, dump_yaml, flatten, leaves, parse, positional, read_yaml
from distcls.config.command_line import ELSEWHERE
from distcls.config.load import Given
from distcls.errors import UsageError, require
from distcls.registry import Registry
from distcls.training.config import OPTIMIZERS, TrainConfig
from distcls.training.schedule import SCHEDULES


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
class Command:
    """A small command."""

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


def command(*arguments: str) -> Command:
    return parse(Command, arguments, prog="try", about="Try it.", config=True)


def train(*arguments: str) -> TrainConfig:
    given_ = ("--data", "d", "--out", "o", *arguments)
    return parse(TrainConfig, given_, prog="distcls train", about="Train.", config=True)


def message(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        train(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


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
    assert "did you mean '--model.name'" in text
    assert "distcls train --help" in text


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--weight-decay", "; did you mean '--optimizer.weight-decay'?"),
        ("--flips", "; did you mean '--augment.flip'?"),
        ("--patience", " (choices: --schedule.patience, --monitor.patience)"),
        ("--checkpoint", "--checkpoint."),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag: str, hint: str) -> None:
    text = message(flag, "3")
    assert f"'{flag}'{hint}" in text if hint[0] != "-" else hint in text
    assert text.count("--") <= 8


def test_a_flag_of_other_training_scripts_names_ours() -> None:
    for flag, others in ELSEWHERE.items():
        for other in others:
            assert f"'--{other}'; did you mean {flag!r}?" in message(f"--{other}", "3")


def test_a_section_with_a_name_takes_it_directly() -> None:
    config = train("--model", "simple_cnn", "--optimizer=sgd", "--loss", "focal")
    assert (config.model.name, config.optimizer.name) == ("simple_cnn", "sgd")
    assert config.loss.name == "focal"


def test_a_positional_argument_may_have_the_flag_that_other_commands_have() -> None:
    assert command("--source", "photos", "--out", "x").source == "photos"
    assert command("--source=photos", "--out", "x").source == "photos"


def test_flags_may_not_be_abbreviated() -> None:
    assert "'--epoch'; did you mean '--epochs'" in message("--epoch", "3")


def test_unknown_key_names_the_file_and_suggests(tmp_path: Path) -> None:
    recipe = yaml_file(tmp_path, "optimizer:\n  weight_decai: 0.1\n")
    text = message("--config", recipe)
    assert text.startswith(recipe)
    assert "unknown key 'optimizer.weight_decai'" in text
    assert "did you mean 'optimizer.weight_decay'" in text


@pytest.mark.parametrize("value", ["", " mobilenet_v3_small"])
def test_a_section_without_keys(tmp_path: Path, value: str) -> None:
    text = message("--config", yaml_file(tmp_path, f"model:{value}\n"))
    assert "'model' takes keys of its own" in text
    assert "model.name" in text


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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a: [1", "not valid YAML"),
        ("\tepochs: 3", "line 1: not valid YAML"),
        ("- epochs", "expected keys with values"),
        ("just text", "expected keys with values"),
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
    found = {leaf.key: leaf for leaf in leaves(Command)}
    order = ["source", "out", "size", "names", "note", "fast", "slow_start"]
    assert list(found) == [*order, "inner.share", "inner.level"]
    assert found["source"].positional
    assert found["out"].default is dataclasses.MISSING
    assert found["inner.share"].default == 0.5
    assert found["slow_start"].doc == "Do not hurry at first."


def test_help_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        train("--help")
    assert left.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    for leaf in leaves(TrainConfig):
        assert leaf.doc, f"{leaf.key} has no docstring"
        assert "--" + leaf.key in shown
        assert "".join(leaf.doc.split()) in shown


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
