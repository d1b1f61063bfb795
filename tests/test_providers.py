"""Plans, what is installed, and choices that are remembered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from distcls import system
from distcls.errors import BadValue, UsageError
from distcls.runtime import autotune, providers
from distcls.runtime.autotune import families, unmeasured
from distcls.runtime.benchmark import disagreement, images_needed
from distcls.runtime.model import OnnxModel
from distcls.runtime.providers import (
    BATCH_SIZE,
    PLUGIN,
    ExecutionConfig,
    execution_of,
    missing,
    require_installed,
)
from distcls.task import Task
from tests import several, tiny_onnx


def test_a_plan_survives_json() -> None:
    plan = ExecutionConfig(
        provider="openvino", precision="reduced", layout="workers", threads=1, streams=3
    )
    assert ExecutionConfig.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert str(plan) == "OpenVINO in reduced precision, 3 workers of 1 thread, batches of 64"
    assert str(ExecutionConfig()) == "CPU, a thread a core, batches of 64"
    assert str(ExecutionConfig(threads=2, batch_size=1)) == "CPU, 2 threads a batch, batches of 1"
    assert str(ExecutionConfig(provider="cuda", streams=2)) == "CUDA, batches of 64"


@pytest.mark.parametrize(
    "wrong",
    [
        {"provider": "gpu"},
        {"precision": "bf16"},
        {"layout": "pipeline"},
        {"threads": -1},
        {"streams": 0},
        {"batch_size": 2.5},
        {"batch_size": True},
        {"speed": 3},
        ["cpu"],
        None,
    ],
)
def test_what_is_no_plan_is_refused(wrong: object) -> None:
    values = {**ExecutionConfig().to_json(), **wrong} if isinstance(wrong, dict) else wrong
    with pytest.raises((BadValue, TypeError)):
        ExecutionConfig.from_json(values)


def test_the_plan_of_a_model(tmp_path: Path) -> None:
    plan = ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=3)
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"), plan)
    assert execution_of(model) == plan
    assert execution_of(object()) == ExecutionConfig(batch_size=BATCH_SIZE)
    wider = ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=30)
    assert execution_of(model.replanned(wider)) == wider
    assert execution_of(model) == plan
    assert model.replanned(ExecutionConfig(threads=2)) is None


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("openvino", "pip install 'distcls[openvino]'"),
        ("cuda", "pip install 'distcls[gpu]'"),
        ("tensorrt", "pip install 'distcls[gpu]' tensorrt"),
    ],
)
def test_what_to_install(name: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "PLUGIN", "onnxruntime_ep_of_nobody")
    monkeypatch.setattr(providers, "_runtime_s_own", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError) as caught:
        require_installed(name)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"provider: {name} is not installed; {advice}")
    assert "(installed: cpu)" in str(caught.value)


def test_cuda_hidden_by_the_plain_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_runtime_s_own", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(providers, "_version", lambda package: "1.31.1")
    assert "pip uninstall onnxruntime" in str(missing("cuda"))
    monkeypatch.setattr(providers, "_runtime_s_own", lambda: ["CUDAExecutionProvider"])
    assert missing("cuda") is None


def test_the_cpu_is_always_there_and_last() -> None:
    assert providers.installed()[-1] == "cpu"
    assert missing("cpu") is None
    require_installed("cpu")


def test_a_plug_in_that_does_not_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text("def get_library_path(): return '/nowhere/x.so'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(providers, "PLUGIN", "broken_plugin")
    providers._openvino_cpu.cache_clear()
    assert "openvino" in providers.installed()
    with pytest.raises(UsageError, match="openvino is installed but does not load beside"):
        OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"), ExecutionConfig(provider="openvino"))


def test_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(autotune.FOLDER, str(tmp_path / "cache"))
    assert autotune.recall("k") is None
    assert autotune.keep("k", {"plan": {"provider": "cpu"}})
    assert autotune.recall("k") == {"format": autotune.FORMAT, "plan": {"provider": "cpu"}}
    (file,) = (tmp_path / "cache" / "providers").iterdir()
    for damaged in (b"", b"{", b"[]", b'{"format": 999}', b"\xff\xfe"):
        file.write_bytes(damaged)
        assert autotune.recall("k") is None
    monkeypatch.setenv(autotune.FOLDER, str(file))  # a file where the folder should be
    assert not autotune.keep("k", {})
    assert autotune.recall("k") is None


def test_where_it_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(autotune.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert system.cache_folder() == tmp_path / "distcls"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert system.cache_folder() == tmp_path / ".cache" / "distcls"


def test_a_choice_holds_for_model_versions_and_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx")
    keys = [autotune.key_of(model, provider="auto"), autotune.key_of(model, provider="cpu")]
    assert keys[0] == autotune.key_of(model, provider="auto")
    keys.append(
        autotune.key_of(
            tiny_onnx.write(tmp_path / "n.onnx", tiny_onnx.card(("a", "b"))), provider="auto"
        )
    )
    monkeypatch.setattr(autotune, "versions", lambda: {"onnxruntime": "9.9"})
    keys.append(autotune.key_of(model, provider="auto"))
    monkeypatch.setattr(autotune, "cpu_name", lambda: "another")
    keys.append(autotune.key_of(model, provider="auto"))
    assert len(set(keys)) == len(keys)


def sizes(**given: object) -> list[list[int]]:
    found = families("cpu", **{"cores": 2, "side": (224, 224), **given})  # type: ignore[arg-type]
    return [[plan.batch_size for plan in family.plans] for family in found]


def test_batches_fit_the_image_and_the_model() -> None:
    assert sizes() == [[4, 16], [4, 16]]
    assert sizes(side=(28, 28)) == [[16, 64], [16, 64]]
    assert sizes(side=(2000, 2000)) == [[1], [1]]
    assert sizes(seconds=0.05) == [[1, 4], [1, 4]]
    assert sizes(seconds=5.0) == [[1], [1]]
    assert sizes(batch_size=7) == [[7], [7]]
    assert sizes(cores=1) == [[4, 16]]


def test_openvino_is_tried_in_reduced_precision_first() -> None:
    plans = [family.plans[0] for family in families("openvino", cores=2, side=(224, 224))]
    assert [plan.precision for plan in plans] == ["reduced", "reduced", "fp32"]
    assert [(plan.layout, plan.threads, plan.streams) for plan in plans] == [
        ("workers", 1, 2),
        ("stages", 2, 1),
        ("workers", 1, 2),
    ]


@pytest.mark.parametrize(
    ("side", "batch"), [((224, 224), 8), ((28, 28), 64), ((384, 384), 2), ((3000, 3000), 1)]
)
def test_without_measuring(side: tuple[int, int], batch: int) -> None:
    plan = unmeasured("cpu", cores=3, side=side)
    assert plan == ExecutionConfig(layout="workers", threads=1, streams=3, batch_size=batch)
    assert unmeasured("cpu", cores=3, side=side, batch_size=5).batch_size == 5
    assert unmeasured("openvino", cores=3, side=side).precision == "fp32"


def test_a_trial_is_of_whole_batches() -> None:
    plan = ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=16)
    assert images_needed(plan, 32, 0.0) == 64
    assert images_needed(plan, 32, 1000.0) == 128
    assert images_needed(ExecutionConfig(batch_size=7), 32, 0.0) == 35


def problem(
    expected: np.ndarray, found: np.ndarray, plan: ExecutionConfig, tolerance: float = 1e-3
) -> str | None:
    targets = Task(classes=("a", "b"))
    return disagreement(expected, found, plan, task=targets, tolerance=tolerance)


def test_who_agrees() -> None:
    expected = np.array([[0.0, 1.0], [2.0, 1.0]] * 500, np.float32)
    exact, reduced = ExecutionConfig(), ExecutionConfig(provider="openvino", precision="reduced")
    assert problem(expected, expected + 5e-4, exact) is None
    assert "1.0e-02 apart" in str(problem(expected, expected + 0.01, exact))
    assert problem(expected, expected + 0.01, reduced) is None
    flipped = expected.copy()
    flipped[:2] = flipped[:2, ::-1]
    assert problem(expected, flipped, reduced) is None  # 99.8 % of 1,000
    assert "998 of 1000" in str(problem(expected, flipped, exact, 10.0))
    flipped[2] = flipped[2, ::-1]
    assert "997 of 1000" in str(problem(expected, flipped, reduced))
    broken = expected.copy()
    broken[3, 0] = np.nan
    for plan in (exact, reduced):
        assert problem(expected, broken, plan) == "its answers are not finite"
        assert problem(broken, expected, plan) is None
        assert "nothing can be compared" in str(problem(expected * np.nan, expected, plan))


def test_heads_and_labels_agree_in_all_their_parts() -> None:
    expected = np.array([[3.0, 0, 0, 1], [0, 3.0, 0, 1]] * 500, np.float32)
    moved = expected.copy()
    moved[:3, 3] = -1  # the greatest of all four stays where it is
    reduced = ExecutionConfig(provider="openvino", precision="reduced")
    for targets, told in [
        (several.heads(2, 2), "997 of 1000"),
        (several.labels(4), "997 of 1000"),
        (several.labels(4, (0.5, 0.5, 0.5, 0.1)), None),
        (Task(classes=tuple("abcd")), None),
    ]:
        found = disagreement(expected, moved, reduced, task=targets, tolerance=1e-3)
        assert (told in str(found)) if told else found is None


def test_the_plug_in_s_module_has_its_name() -> None:
    assert PLUGIN.replace("_", "-") in providers.PACKAGES
