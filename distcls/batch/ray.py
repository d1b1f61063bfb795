"""Batch prediction over a Ray cluster: its workers make the parts of the output, in any order.

Each worker opens input and models itself, by the same names, so these have to be where all nodes
see them: on a shared file system or in an object store. A part is the same whoever makes it, so
the output is byte-equal to that of one machine that computes in the same way, and a run that was
killed goes on with either. A worker or node that dies is made up for by Ray.
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
from distcls.batch.options import PredictOptions
from distcls.batch.part_writer import PartWriter
from distcls.batch.parts import Identity, PartRecord
from distcls.batch.setup import fingerprint_of
from distcls.data.formats.remote import is_url
from distcls.data.source import ImageSource
from distcls.errors import DistclsError, UsageError
from distcls.runtime.ensemble import executions_of
from distcls.runtime.model import Model
from distcls.runtime.providers import ExecutionConfig
from distcls.system import available_cores

MOST_BLOCKS = 4096
"""Ray keeps count of every block; of more parts than this several share one."""

AHEAD = 2
"""Parts that wait at a worker: enough that it never does, few enough that all have some."""

SAME = ("distcls", "model", "inputs", "images")
"""What of an identity is compared between nodes."""

Made = tuple[PartRecord, dict[str, bytes]]
"""A part: its record, and the content of its files by name."""

Reopen = Callable[[PredictOptions, list[ExecutionConfig]], tuple[Model, ImageSource]]
"""Opens what is asked for, run as planned; a function that another process can import."""


def check_ray(options: PredictOptions) -> None:
    """Raise UsageError, before any work, if Ray is missing or cannot do what is asked."""
    if options.input == "-":
        raise UsageError(
            "engine: ray cannot hand standard input to other machines; write the list into a "
            "manifest (.csv with a column path)"
        )
    if options.profile is not None:
        raise UsageError("profile: measures the threads of one machine, use it with --engine local")
    try:
        import ray.data  # noqa: F401 - is it there?
    except ModuleNotFoundError as error:
        raise UsageError(
            f'engine: {error.name} is not installed; pip install "distcls[ray]"'
        ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
    """How many workers there are, and what each takes of its node."""

    workers: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, nodes: Sequence[dict[str, Any]], cores: int, *, gpu: bool) -> Fleet:
        """As many workers as the nodes (as `ray.nodes()` lists them) have room for.

        Each has the `cores` that its plan was made for, or all of the smallest node; with `gpu`
        a GPU of its own. Raises UsageError if no node has any.
        """
        resources = [node["Resources"] for node in nodes if node["Alive"]]
        if gpu:
            gpus = sum(int(node.get("GPU", 0)) for node in resources)
            if not gpus:
                raise UsageError("provider: no node of the Ray cluster has a GPU")
            return cls(workers=gpus, cpus=1, gpus=1)
        sizes = [int(node.get("CPU", 0)) for node in resources]
        sizes = [size for size in sizes if size]  # a head node may be kept free of work
        if not sizes:
            raise UsageError("engine: no node of the Ray cluster has a CPU to compute on")
        each = min(cores, *sizes)
        return cls(workers=sum(size // each for size in sizes), cpus=each, gpus=0)


def made_on_ray(
    making: PartWriter, identity: Identity, numbers: range, reopen: Reopen
) -> Iterator[Made]:
    """The parts of these numbers in order, each as soon as it and those before it are made.

    Works on the cluster of RAY_ADDRESS or of this machine, or starts one here. Raises
    DistclsError for what goes wrong on a worker.
    """
    import ray
    from ray.data import ActorPoolStrategy

    options, plans = making.options, executions_of(making.model)
    with _cluster():
        gpu = plans[0].gpu
        nodes = [node for node in ray.nodes() if node["Alive"]]
        fleet = Fleet.of(nodes, options.workers or available_cores(), gpu=gpu)
        workers = min(fleet.workers, len(numbers))
        log.say(f"Ray: {workers} worker(s), {len(nodes)} node(s) in the cluster")
        # items, no range: reading a range takes CPUs, and the workers have them all
        items = ray.data.from_items(
            [{"number": number} for number in numbers],
            override_num_blocks=min(len(numbers), MOST_BLOCKS),
        )
        made = items.map_batches(
            Worker,
            batch_size=1,
            fn_constructor_args=[reopen, _everywhere(options), plans, identity],
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=AHEAD),
            num_cpus=fleet.cpus,
            num_gpus=fleet.gpus,
        )
        failed = ""
        # closed before Ray is left: what still runs then would abort this process
        with contextlib.closing(_generator(made.iter_rows())) as rows:
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
    """What runs on a node: input and models, opened once, and parts made from them."""

    def __init__(
        self,
        reopen: Reopen,
        options: PredictOptions,
        plans: list[ExecutionConfig],
        identity: Identity,
    ) -> None:
        log.set_quiet(True)
        self._failed = ""
        try:
            self._making = _opened(reopen, options, plans, identity)
        except DistclsError as error:  # told by the first part: Ray would start us again and again
            self._failed = f"{os.uname().nodename}: {error}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the part of `batch["number"]`, [1]: its record and files, or why that failed."""
        [number] = batch["number"].tolist()
        record, names, content = "", [], []
        if not self._failed:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    [found] = self._making.in_order(range(number, number + 1), Path(folder))
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


def _opened(
    reopen: Reopen, options: PredictOptions, plans: list[ExecutionConfig], identity: Identity
) -> PartWriter:
    """Input and models as this node sees them.

    Raises DistclsError if they are not those of whoever asks, or cannot be run in the same way.
    """
    model, source = reopen(options, plans)
    own = fingerprint_of(model, source, options)
    for key in SAME:
        if own[key] != identity[key]:
            raise DistclsError(
                f"{key} {str(own[key])[:12]} here, {str(identity[key])[:12]} where the run was "
                "started; input, models and distcls have to be the same on all nodes"
            )
    if executions_of(model) != plans:
        ways = "; ".join(map(str, plans))
        raise DistclsError(f"cannot compute as planned here ({ways}); choose another --provider")
    return PartWriter(model, source, options)


def _files(row: dict[str, Any]) -> dict[str, bytes]:
    """The files that a worker has sent as one string of bytes."""
    content, start, files = bytes(row["content"]), 0, {}
    for name, size in zip(json.loads(row["names"]), json.loads(row["sizes"]), strict=True):
        files[name] = content[start : start + size]
        start += size
    return files


def _everywhere(options: PredictOptions) -> PredictOptions:
    """The same options with absolute paths: workers run in folders of their own."""
    changes: dict[str, Any] = {"model": ",".join(str(path.absolute()) for path in options.models)}
    if not is_url(options.input):
        changes["input"] = str(Path(options.input).absolute())
    if options.classes is not None:
        changes["classes"] = options.classes.absolute()
    return dataclasses.replace(options, **changes)


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """Connect to Ray, quietly, and turn what becomes of it into one line."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings look like errors of ours
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
        raise  # a bug of ours, with the worker's traceback
    except (RayError, ConnectionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DistclsError(f"prediction on Ray failed: {lines[0]}") from error
    finally:
        if began:
            ray.shutdown()
