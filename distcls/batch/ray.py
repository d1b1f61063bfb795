"""Batch prediction on a Ray cluster: its workers write the parts of the output, in any order.

Each worker opens input and models itself, by the same names, so these have to be on a shared file
system or in an object store that all nodes can read. A part is the same whichever node writes it,
so the output is byte-equal to that of one machine with the same execution config, and a run that
was killed can be resumed on either. Ray replaces a worker or node that dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distcls import log
from distcls.batch.loading import fingerprint_of
from distcls.batch.options import PredictOptions
from distcls.batch.part_writer import PartWriter
from distcls.batch.parts import Fingerprint, PartRecord
from distcls.data.formats.remote import is_url
from distcls.data.source import ImageSource
from distcls.errors import DistclsError, UsageError
from distcls.runtime.ensemble import executions_of
from distcls.runtime.model import Model
from distcls.runtime.providers import ExecutionConfig
from distcls.system import available_cores

MAX_BLOCKS = 4096
"""Ray tracks every block; with more parts than this a block holds more than one."""

PREFETCH = 2
"""Parts queued at a worker: enough that it never idles, few enough that all have some."""

COMPARED = ("distcls", "model", "inputs", "images")
"""Keys of the fingerprint that have to agree between nodes."""

WrittenPart = tuple[PartRecord, dict[str, bytes]]
"""A part: its record, and the content of its files by name."""

Reopen = Callable[[PredictOptions, list[ExecutionConfig]], tuple[Model, ImageSource]]
"""Opens model and source of the options, the models run as given; another process imports it."""


def check_ray(options: PredictOptions) -> None:
    """Raise UsageError, before any work, if Ray is missing or cannot run with these options."""
    if len(options.inputs) > 1:
        raise UsageError("engine: ray accepts one INPUT; use a folder, a glob or a manifest")
    if options.inputs == ("-",):
        raise UsageError(
            "engine: ray cannot read standard input on other machines; write the list to a "
            "manifest (.csv with a column path)"
        )
    if options.profile is not None:
        raise UsageError("profile: measures the threads of one machine, use it with --engine local")
    try:
        import ray.data  # noqa: F401 - is it installed?
    except ModuleNotFoundError as error:
        raise UsageError(
            f'engine: {error.name} is not installed; pip install "distcls[ray]"'
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerAllocation:
    """How many workers there are, and the resources of each."""

    workers: int
    cpus: int
    gpus: int

    @classmethod
    def fit(cls, nodes: Sequence[dict[str, Any]], cores: int, *, gpu: bool) -> WorkerAllocation:
        """As many workers as fit on the nodes (as `ray.nodes()` lists them).

        Each has the `cores` of its execution config, or all of the smallest node; with `gpu` a GPU
        of its own. Raises UsageError if no node has any.
        """
        resources = [node["Resources"] for node in nodes if node["Alive"]]
        if gpu:
            gpus = sum(int(node.get("GPU", 0)) for node in resources)
            if not gpus:
                raise UsageError("provider: no node of the Ray cluster has a GPU")
            return cls(workers=gpus, cpus=1, gpus=1)
        sizes = [int(node.get("CPU", 0)) for node in resources]
        sizes = [size for size in sizes if size]  # a head node may have no resources for work
        if not sizes:
            raise UsageError("engine: no node of the Ray cluster has a CPU to compute on")
        each = min(cores, *sizes)
        return cls(workers=sum(size // each for size in sizes), cpus=each, gpus=0)


def write_on_ray(
    writer: PartWriter, fingerprint: Fingerprint, numbers: range, reopen: Reopen
) -> Iterator[WrittenPart]:
    """The parts of these numbers in order, each as soon as it and those before it are written.

    Works on the cluster of RAY_ADDRESS or of this machine, or starts one here. Raises
    DistclsError if a worker fails.
    """
    import ray
    from ray.data import ActorPoolStrategy

    options, executions = writer.options, executions_of(writer.model)
    with _cluster():
        gpu = executions[0].gpu
        nodes = [node for node in ray.nodes() if node["Alive"]]
        allocation = WorkerAllocation.fit(nodes, options.workers or available_cores(), gpu=gpu)
        workers = min(allocation.workers, len(numbers))
        log.say(f"Ray: {workers} worker(s), {len(nodes)} node(s) in the cluster")
        # items, no range: reading a range takes CPUs, and the workers have them all
        items = ray.data.from_items(
            [{"number": number} for number in numbers],
            override_num_blocks=min(len(numbers), MAX_BLOCKS),
        )
        written = items.map_batches(
            Worker,
            batch_size=1,
            fn_constructor_args=[reopen, _with_absolute_paths(options), executions, fingerprint],
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=PREFETCH),
            num_cpus=allocation.cpus,
            num_gpus=allocation.gpus,
        )
        failed = ""
        # closed before Ray shuts down: what still runs then would abort this process
        with contextlib.closing(_generator(written.iter_rows())) as rows:
            for row in rows:
                failed = row["failed"]
                if failed:
                    break
                yield PartRecord(**json.loads(row["record"])), _files(row)
    if failed:
        raise DistclsError(failed)


def _generator(rows: Iterable[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
    yield from rows


class Worker:
    """Runs on a node: opens input and models once, and writes parts from them."""

    def __init__(
        self,
        reopen: Reopen,
        options: PredictOptions,
        executions: list[ExecutionConfig],
        fingerprint: Fingerprint,
    ) -> None:
        log.set_quiet(True)
        self._failed = ""
        try:
            self._writer = _open_writer(reopen, options, executions, fingerprint)
        except DistclsError as error:  # raised with the first part: Ray would restart us forever
            self._failed = f"{os.uname().nodename}: {error}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the part of `batch["number"]`, [1]: its record and files, or why that failed."""
        [number] = batch["number"].tolist()
        record, names, content = "", [], []
        if not self._failed:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    [found] = self._writer.write(range(number, number + 1), Path(folder))
                    record, names = json.dumps(dataclasses.asdict(found)), list(found.files)
                    content = [Path(folder, name).read_bytes() for name in names]
                except DistclsError as error:
                    self._failed = f"{os.uname().nodename}: {error}"
        return {
            "failed": [self._failed],
            "record": [record],
            "names": [json.dumps(names)],
            "sizes": [json.dumps([len(each) for each in content])],
            "content": [b"".join(content)],
        }


def _open_writer(
    reopen: Reopen,
    options: PredictOptions,
    executions: list[ExecutionConfig],
    fingerprint: Fingerprint,
) -> PartWriter:
    """A writer with input and models as this node sees them.

    Raises DistclsError if they differ from those of the run, or cannot be run in the same way.
    """
    model, source = reopen(options, executions)
    own, expected = fingerprint_of(model, source, options).values, fingerprint.values
    for key in COMPARED:
        if own[key] != expected[key]:
            raise DistclsError(
                f"{key} {str(own[key])[:12]} here, {str(expected[key])[:12]} where the run was "
                "started; input, models and distcls have to be the same on all nodes"
            )
    if executions_of(model) != executions:
        ways = "; ".join(map(str, executions))
        raise DistclsError(f"cannot run on {ways} here; choose another --provider")
    return PartWriter(model, source, options)


def _files(row: dict[str, Any]) -> dict[str, bytes]:
    """The files of a part, which a worker sends joined."""
    content, start, files = bytes(row["content"]), 0, {}
    for name, size in zip(json.loads(row["names"]), json.loads(row["sizes"]), strict=True):
        files[name] = content[start : start + size]
        start += size
    return files


def _with_absolute_paths(options: PredictOptions) -> PredictOptions:
    """The same options: workers run in folders of their own."""
    changes: dict[str, Any] = {"model": ",".join(str(path.absolute()) for path in options.models)}
    [location] = options.inputs
    if not is_url(location):
        changes["input"] = str(Path(location).absolute())
    if options.classes is not None:
        changes["classes"] = options.classes.absolute()
    return dataclasses.replace(options, **changes)


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """Connect to Ray, quietly, and turn its errors into one line."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings resemble our errors
    import ray
    from ray.data import DataContext
    from ray.exceptions import RayError, RayTaskError

    began = not ray.is_initialized()
    try:
        if began:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield
    except RayTaskError:
        raise  # a bug in distcls, with the worker's traceback
    except (RayError, ConnectionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DistclsError(f"prediction on Ray failed: {lines[0]}") from error
    finally:
        if began:
            ray.shutdown()
