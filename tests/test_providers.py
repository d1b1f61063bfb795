"""Execution configs, the registry of execution providers, and what each says of itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcls.batch.options import PredictOptions
from distcls.commands.predict import main
from distcls.data.source import FunctionSource
from distcls.errors import BadValue, DistclsError, UsageError
from distcls.evaluation.evaluate import EvaluateOptions
from distcls.runtime import providers
from distcls.runtime.autotune import choose, measure, open_fastest
from distcls.runtime.benchmark import Benchmark, disagreement, images_needed
from distcls.runtime.model import OnnxModel
from distcls.runtime.providers import (
    PROVIDERS,
    ExecutionConfig,
    ExecutionRequest,
    OpenVino,
    Provider,
    installed,
    known_providers,
    register,
    require_installed,
    versions,
)
from distcls.task import Task
from tests import multi_output, tiny_dataset, tiny_onnx


def test_an_execution_config_survives_json() -> None:
    execution = ExecutionConfig(
        provider="openvino", precision="reduced", layout="workers", threads=1, streams=3
    )
    assert ExecutionConfig.from_json(json.loads(json.dumps(execution.to_json()))) == execution
    assert str(execution) == "OpenVINO in reduced precision, 3 workers of 1 thread, batches of 64"
    assert str(ExecutionConfig()) == "CPU, 1 thread per core, batches of 64"
    assert str(ExecutionConfig(threads=2, batch_size=1)) == "CPU, 2 threads per batch, batches of 1"
    assert str(ExecutionConfig(provider="cuda", streams=2)) == "CUDA, batches of 64"


@pytest.mark.parametrize(
    "wrong",
    [
        {"provider": "gpu"},
        {"provider": "auto"},
        {"provider": ["cpu"]},
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
def test_what_is_no_execution_config_is_refused(wrong: object) -> None:
    values = {**ExecutionConfig().to_json(), **wrong} if isinstance(wrong, dict) else wrong
    with pytest.raises((BadValue, TypeError)):
        ExecutionConfig.from_json(values)


def test_one_session_runs_in_several_ways(tmp_path: Path) -> None:
    execution = ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=3)
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"), execution)
    wider = ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=30)
    other = model.with_execution(wider)
    assert other is not None
    assert other.execution == wider
    assert model.execution == execution
    assert model.with_execution(ExecutionConfig(threads=2)) is None


@pytest.mark.parametrize("make", [ExecutionRequest, PredictOptions, EvaluateOptions])
def test_an_unknown_provider_is_one_line_with_the_choices(make: Any) -> None:
    required = {
        ExecutionRequest: {},
        PredictOptions: {"input": "in", "model": "m.onnx"},
        EvaluateOptions: {"model": "m.onnx", "data": "d"},
    }[make]
    assert make(provider="auto", **required).provider == "auto"
    with pytest.raises(UsageError) as caught:
        make(provider="cudda", **required)
    assert str(caught.value) == (
        "provider: 'cudda' is not valid, expected a known execution provider; did you mean 'cuda'? "
        "(choices: auto, cpu, openvino, cuda, tensorrt)"
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("openvino", "pip install 'distcls[openvino]'"),
        ("cuda", "pip install 'distcls[gpu]'"),
        ("tensorrt", "pip install 'distcls[gpu]' tensorrt"),
    ],
)
def test_what_to_install(name: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "plugin", "onnxruntime_ep_of_nobody")
    monkeypatch.setattr(providers, "_available_in_runtime", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError) as caught:
        require_installed(name)
    message = str(caught.value)
    assert message == f"provider: {name} is not installed; {advice} (installed: cpu)"


def test_cuda_hidden_by_the_plain_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_available_in_runtime", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(providers, "_version", lambda package: "1.31.1")
    assert "pip uninstall onnxruntime" in str(PROVIDERS["cuda"].missing())
    monkeypatch.setattr(providers, "_available_in_runtime", lambda: ["CUDAExecutionProvider"])
    assert PROVIDERS["cuda"].missing() is None


def test_the_cpu_is_always_installed_and_tried_last() -> None:
    assert installed()[-1] == "cpu"
    require_installed("cpu")


def test_gpu_providers_say_so() -> None:
    assert [name for name in PROVIDERS if ExecutionConfig(provider=name).gpu] == [
        "cuda",
        "tensorrt",
    ]


def test_versions_decide_speed_and_exactness() -> None:
    assert list(versions()) == [
        "onnxruntime",
        "onnxruntime-ep-openvino",
        "onnxruntime-gpu",
        "tensorrt",
    ]
    assert OpenVino.plugin.replace("_", "-") in versions()


def test_a_plug_in_that_does_not_load_keeps_its_first_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text(
        "attempts = []\n"
        "def get_library_path():\n"
        "    attempts.append(1)\n"
        "    raise RuntimeError(f'attempt {len(attempts)}')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(OpenVino, "plugin", "broken_plugin")
    monkeypatch.setitem(PROVIDERS, "openvino", OpenVino())
    assert "openvino" in installed()
    path = tiny_onnx.write(tmp_path / "m.onnx")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"installed but does not load beside .*: attempt 1"):
            OnnxModel(path, ExecutionConfig(provider="openvino"))


class Toy(Provider):
    """The CPU under another name: all that a new provider has to say."""

    name = "toy"
    title = "Toy"
    execution_provider = "CPUExecutionProvider"
    problem: str | None = None

    def missing(self) -> str | None:
        """Whatever the test says."""
        return self.problem

    def configure(self, execution: ExecutionConfig, options: Any) -> list[Any]:
        """The CPU."""
        assert execution.provider == "toy"
        return [self.execution_provider]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Toy]:
    monkeypatch.setenv("DISTCLS_CACHE", str(tmp_path / "cache"))
    before = dict(PROVIDERS)
    register(Toy)
    yield PROVIDERS["toy"]  # type: ignore[misc]
    PROVIDERS.clear()
    PROVIDERS.update(before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


def test_a_new_provider_is_one_class(
    toy: Toy, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadValue, match="choices: auto, cpu, openvino, cuda, tensorrt, toy"):
        ExecutionRequest(provider="toys")
    assert installed()[0] == "toy"
    model = open_fastest(path, ExecutionRequest(provider="toy", images=1000))
    assert model.execution.provider == "toy"
    assert capsys.readouterr().err.startswith("provider: Toy, ")
    pictures = tiny_dataset.write_images(tmp_path / "in", tiny_dataset.coloured(3)[0])
    out = tmp_path / "pre.csv"
    main([str(pictures), "--model", str(path), "--out", str(out), "--provider", "toy"])
    assert len(out.read_text().splitlines()) == 4


def test_auto_measures_a_new_provider_and_may_choose_it(toy: Toy, path: Path) -> None:
    request = ExecutionRequest(workers=2, images=10_000)

    class Slow(OnnxModel):
        """The CPU, no faster than 50 images/s per worker."""

        def logits(self, images: Any) -> Any:
            time.sleep(0.02 * len(images))
            return super().logits(images)

    def open_model(execution: ExecutionConfig) -> OnnxModel:
        return (OnnxModel if execution.provider == "toy" else Slow)(path, execution)

    reference = Slow(path, PROVIDERS["cpu"].default_execution(2, (8, 8)))
    images, _ = tiny_dataset.coloured(20)
    source = FunctionSource([""] * 20, lambda index: images[index])
    measured = measure(reference, request, Benchmark.of(source), open_model)
    assert {found.execution.provider for found in measured} >= {"toy", "cpu"}
    best = choose([found for found in measured if found.execution.provider in ("toy", "cpu")])
    assert best.execution.provider == "toy"
    assert best.model is not None


def test_a_new_provider_is_refused_with_its_reason(
    toy: Toy, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.problem = "needs its box"
    assert "toy" not in installed()
    with pytest.raises(UsageError, match=r"provider: toy needs its box \(installed: cpu"):
        open_fastest(path, ExecutionRequest(provider="toy", images=1))
    toy.problem = None
    monkeypatch.setattr(Toy, "execution_provider", "ToyExecutionProvider")
    with pytest.raises(DistclsError, match=r"provider: toy is not used: .*Toy"):
        open_fastest(path, ExecutionRequest(provider="toy", images=1000))


def test_a_provider_of_a_user_s_own_module(
    toy: Toy, tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_provider.py").write_text(
        "from distcls.runtime.providers import Cpu, register\n"
        "@register\n"
        "class Own(Cpu):\n"
        "    name, title, packages = 'own', 'Own', ('own-package',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadValue, match="'own' is not valid"):
        ExecutionRequest(provider="own")
    monkeypatch.setenv("DISTCLS_IMPORT", "own_provider")
    assert installed()[0] == "own"
    assert versions()["own-package"] is None
    model = open_fastest(path, ExecutionRequest(provider="own", images=1))
    assert str(model.execution).startswith("Own, ")


def test_a_name_is_registered_once() -> None:
    for name in ("cpu", "auto"):
        with pytest.raises(ValueError, match="is known already"):
            register(type("Again", (Toy,), {"name": name}))


def test_a_module_that_fails_fails_with_its_reason_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with `is known already`, which would hide it."""
    (tmp_path / "failing_provider.py").write_text(
        "from distcls.runtime.providers import Cpu, register\n"
        "@register\n"
        "class Odd(Cpu):\n"
        "    name = 'odd'\n"
        "raise RuntimeError('no driver')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("DISTCLS_IMPORT", "failing_provider")
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no driver"):
                known_providers()
    finally:
        PROVIDERS.pop("odd", None)


def sizes(batch_size: int | None = None, cores: int = 2, **given: Any) -> list[list[int]]:
    cpu = PROVIDERS["cpu"]
    fitting = cpu.fitting_batch_sizes(**{"size": (224, 224), "seconds": 0.0, **given})
    groups = cpu.search_space(cores, [batch_size] if batch_size else fitting)
    return [[execution.batch_size for execution in group.executions] for group in groups]


def test_batches_fit_the_image_and_the_model() -> None:
    assert sizes() == [[4, 16], [4, 16]]
    assert sizes(size=(28, 28)) == [[16, 64], [16, 64]]
    assert sizes(size=(2000, 2000)) == [[1], [1]]
    assert sizes(seconds=0.05) == [[1, 4], [1, 4]]
    assert sizes(seconds=5.0) == [[1], [1]]
    assert sizes(batch_size=7) == [[7], [7]]
    assert sizes(cores=1) == [[4, 16]]


def test_openvino_is_measured_in_reduced_precision_first() -> None:
    groups = PROVIDERS["openvino"].search_space(2, [4])
    executions = [group.executions[0] for group in groups]
    assert [execution.precision for execution in executions] == ["reduced", "reduced", "fp32"]
    assert [(each.layout, each.threads, each.streams) for each in executions] == [
        ("workers", 1, 2),
        ("stages", 2, 1),
        ("workers", 1, 2),
    ]
    assert [group.always for group in groups] == [True, False, True]


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_gpus_have_two_streams_and_larger_batches(name: str) -> None:
    provider = PROVIDERS[name]
    assert provider.fitting_batch_sizes((224, 224), seconds=9.0) == (32, 128)
    groups = provider.search_space(8, [32])
    assert [group.executions[0] for group in groups] == [
        ExecutionConfig(provider=name, precision=precision, threads=1, streams=2, batch_size=32)
        for precision in ("reduced", "fp32")
    ]
    assert all(group.always for group in groups)
    default = ExecutionConfig(provider=name, threads=1, streams=2, batch_size=32)
    assert provider.default_execution(8, (224, 224)) == default


def test_what_a_gpu_cannot_compute_falls_back() -> None:
    def configured(name: str, precision: providers.Precision) -> list[Any]:
        execution = ExecutionConfig(provider=name, precision=precision)
        return PROVIDERS[name].configure(execution, options=None)

    exact = {"use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    cuda = [("CUDAExecutionProvider", exact), "CPUExecutionProvider"]
    assert configured("cuda", "fp32") == cuda
    tensorrt = ("TensorrtExecutionProvider", {"trt_fp16_enable": False})
    assert configured("tensorrt", "fp32") == [tensorrt, *cuda]
    assert configured("tensorrt", "reduced")[0][1] == {"trt_fp16_enable": True}
    assert configured("cuda", "reduced")[0][1]["use_tf32"] == 1


@pytest.mark.parametrize(
    ("size", "batch"), [((224, 224), 8), ((28, 28), 64), ((384, 384), 2), ((3000, 3000), 1)]
)
def test_without_measuring(size: tuple[int, int], batch: int) -> None:
    execution = PROVIDERS["cpu"].default_execution(3, size)
    assert execution == ExecutionConfig(layout="workers", threads=1, streams=3, batch_size=batch)
    assert PROVIDERS["cpu"].default_execution(3, size, 5).batch_size == 5
    assert PROVIDERS["openvino"].default_execution(3, size).precision == "fp32"


def test_a_measurement_is_of_whole_batches() -> None:
    execution = ExecutionConfig(layout="workers", threads=1, streams=2, batch_size=16)
    assert images_needed(execution, 32, 0.0) == 64
    assert images_needed(execution, 32, 1000.0) == 128
    assert images_needed(ExecutionConfig(batch_size=7), 32, 0.0) == 35


def problem(
    expected: np.ndarray, found: np.ndarray, execution: ExecutionConfig, tolerance: float = 1e-3
) -> str | None:
    task = Task(classes=("a", "b"))
    return disagreement(expected, found, execution, task=task, tolerance=tolerance)


def test_agreement() -> None:
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
    for execution in (exact, reduced):
        assert problem(expected, broken, execution) == "its logits are not finite"
        assert problem(broken, expected, execution) is None
        assert "nothing can be compared" in str(problem(expected * np.nan, expected, execution))


def test_all_heads_and_labels_have_to_agree() -> None:
    expected = np.array([[3.0, 0, 0, 1], [0, 3.0, 0, 1]] * 500, np.float32)
    moved = expected.copy()
    moved[:3, 3] = -1  # the greatest of all four stays where it is
    reduced = ExecutionConfig(provider="openvino", precision="reduced")
    for task, expected_problem in [
        (multi_output.heads(2, 2), "997 of 1000"),
        (multi_output.labels(4), "997 of 1000"),
        (multi_output.labels(4, (0.5, 0.5, 0.5, 0.1)), None),
        (Task(classes=tuple("abcd")), None),
    ]:
        found = disagreement(expected, moved, reduced, task=task, tolerance=1e-3)
        assert (expected_problem is None) == (found is None)
        assert str(expected_problem) in str(found)
