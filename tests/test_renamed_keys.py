"""Config keys under their old names: in YAML, flags, saved states and model cards."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from distcls.config import leaves, parse
from distcls.config.load import RENAMED
from distcls.errors import UsageError
from distcls.models.checkpoint import load_tensors, open_checkpoint
from distcls.models.config import ModelConfig
from distcls.training.checkpointing import CheckpointManager
from distcls.training.config import TrainConfig

OLD = Path(__file__).parent / "fixtures" / "v076daf9"
"""Files written by the version before the renaming."""


def read(*arguments: str) -> TrainConfig:
    given = ("--data", "digits", "--out", "run", *arguments)
    return parse(TrainConfig, given, prog="distcls train", about="", config=True)


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if "warning" in line]


def test_each_new_name_is_a_key_and_no_old_one_is() -> None:
    keys = {leaf.key for leaf in leaves(TrainConfig)}
    assert set(RENAMED.values()) <= keys
    assert not keys & set(RENAMED)


def value_of(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


OTHER: dict[str, str] = {
    **{"sync_norm": "true", "layout": "contiguous", "max_bad_steps": "3", "loader.ahead": "9"},
    **{"model.norm_momentum": "0.5", "distill.share": "0.25", "augment.cutmix_share": "0.25"},
    **{"average.last": "2", "checkpoint.keep": "3", "checkpoint.name": "e{epoch}.pth"},
    **{"checkpoint.keep_best": "4", "checkpoint.best_only": "false", "checkpoint.whole": "true"},
}
"""A value that is no default, for each old name."""
NEEDED = {
    "distill.share": ["--distill.teacher", "t.pth"],
    "augment.cutmix_share": ["--augment.mixup", "1", "--augment.cutmix", "1"],
}


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("place", ["flag", "YAML"])
def test_an_old_name_is_taken_with_one_line_of_warning(
    old: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{old}: {OTHER[old]}\n")
    flags = [f"--{old}", OTHER[old]] if place == "flag" else ["--config", str(recipe)]
    found = read(*flags, *NEEDED.get(old, []))
    assert warnings(capsys) == [
        f"warning: {old} is now {RENAMED[old]}; the old name will be removed"
    ]
    assert found == read(f"--{RENAMED[old]}", OTHER[old], *NEEDED.get(old, []))
    assert value_of(found, RENAMED[old]) != value_of(read(*NEEDED.get(old, [])), RENAMED[old])
    assert not warnings(capsys)


def test_a_bare_flag_and_one_with_hyphens(capsys: pytest.CaptureFixture[str]) -> None:
    assert read("--sync-norm").sync_batch_norm
    assert read("--checkpoint.keep-best", "7").checkpoint.save_top_k == 7
    assert len(warnings(capsys)) == 2


def test_help_names_the_new_ones_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert {f"--{new}".replace("_", "-") for new in RENAMED.values()} <= words
    assert not {f"--{old}".replace("_", "-") for old in RENAMED} & words


def test_the_config_of_an_old_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = read("--config", str(OLD / "run" / "config.yaml"))
    assert found.checkpoint.save_training_state
    assert found.checkpoint.keep_last == 1
    [line] = warnings(capsys)
    assert line.count(" is now ") == len(RENAMED)
    assert line.endswith("the old names will be removed")


def test_a_flag_wins_over_a_file_whatever_their_names(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loader: {ahead: 5}\n")
    assert read("--config", str(recipe), "--loader.prefetch", "6").loader.prefetch == 6
    recipe.write_text("loader: {prefetch: 5}\n")
    assert read("--config", str(recipe), "--loader.ahead", "6").loader.prefetch == 6


def test_both_names_at_once_are_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("loader: {ahead: 5, prefetch: 5}\n")
    both = "loader.ahead is the old name of loader.prefetch; give one of the two"
    with pytest.raises(UsageError, match=both):
        read("--config", str(recipe))
    with pytest.raises(UsageError, match=both):
        read("--loader.ahead", "5", "--loader.prefetch", "5")


def test_other_configs_do_not_know_them() -> None:
    with pytest.raises(UsageError, match=r"unexpected argument '--norm.momentum'"):
        parse(ModelConfig, ["--norm_momentum", "0.5"], prog="x", about="")


def old_run(**changes: Any) -> TrainConfig:
    """The config of the old run, read as a user of today gives it."""
    config = read("--config", str(OLD / "run" / "config.yaml"))
    return dataclasses.replace(config, **changes)


def test_a_state_of_an_old_run_fits_its_config(tmp_path: Path) -> None:
    shutil.copytree(OLD / "run", tmp_path / "run")
    found = CheckpointManager(old_run(out=tmp_path / "run", resume="auto")).resume()
    assert found is not None
    assert found[0].step == 7
    [model] = (OLD / "whole").glob("*_e4_*.pth")
    found = CheckpointManager(old_run(out=tmp_path / "new", resume=str(model))).resume()
    assert found is not None
    assert found[0].epoch == 4
    other = dataclasses.replace(old_run().model, batch_norm_momentum=0.5)
    with pytest.raises(UsageError, match=r"^model\.batch_norm_momentum: 0\.5 given"):
        CheckpointManager(old_run(out=tmp_path / "run", resume="auto", model=other)).resume()


@pytest.mark.parametrize("run", ["whole", "run_heads", "run_labels"])
def test_a_model_of_an_old_run_opens(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = OLD / run / "best.pth"
    assert load_tensors(path)["card"]["architecture"]["norm_momentum"] == 0.1
    assert open_checkpoint(path).model.eval()
    assert not warnings(capsys)
