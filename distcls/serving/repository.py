"""The models that are served: where their files are, which versions are loaded, and reloading.

A new version is opened beside the old one, in processes of its own, and only when it has proven
itself is one reference switched; a request that has begun keeps the version it began with. A new
file that cannot be served leaves the old version where it is, and its reason in the index.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distcls import log
from distcls.errors import DistclsError, UsageError, did_you_mean
from distcls.serving.engine import Engine, Lane, LaneDied, LocalLane, ProcessLane
from distcls.serving.metrics import Statistics
from distcls.serving.options import NAME, ServeOptions
from distcls.serving.protocol import Interface, Refused
from distcls.serving.work import BatchFailed
from distcls.stored import regular_descriptor
from distcls.task import Task

RETIRED = 8
"""Versions that are no longer served whose counts are still shown: a scrape may come later."""
DRAIN_OLD = 30.0
"""Seconds that requests of a replaced version may take."""
MODEL_FILES = ("model.onnx", "best.onnx")
"""Names of the file in the folder of a version."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the newest version of a model lies, and what tells it from others."""

    path: Path
    version: str | None
    """Its folder's number; None for a single file, whose versions are counted."""
    stamp: tuple[int, int, int]
    """Inode, size and time of change in ns."""


class Version:
    """One version of a model, ready to be used."""

    def __init__(self, name: str, version: str, engine: Engine, most: int) -> None:
        self.name, self.version, self.engine = name, version, engine
        facts = engine.facts
        self.card: dict[str, Any] = facts["card"]
        self.interface = Interface(
            name=name,
            version=version,
            size=(facts["card"]["preprocess"]["size"][0], facts["card"]["preprocess"]["size"][1]),
            task=_task_of(facts),
            features=facts["features"],
            most=most,
        )
        self.statistics = Statistics()


def _task_of(facts: dict[str, Any]) -> Task:
    """The task that a compute process describes, with its temperatures."""
    temperatures = facts["temperatures"]
    given = None if temperatures is None else tuple(temperatures)
    return dataclasses.replace(Task.from_json(facts["task"]), temperatures=given)


class _Model:
    """A model by name: the version that is served, and how a change of it went."""

    def __init__(self) -> None:
        self.current: Version | None = None
        self.stamp: tuple[int, int, int] | None = None
        self.state = "LOADING"
        self.reason = ""
        self.failed_version = ""
        self.wanted = True
        """False once a client has unloaded it."""
        self.loads = {"served": 0, "refused": 0}
        """How often a file was loaded, by the outcome."""
        self.lock = asyncio.Lock()


class Repository:
    """All models, by name."""

    def __init__(self, options: ServeOptions) -> None:
        self._options = options
        self._models: dict[str, _Model] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._old: list[Version] = []
        self._said: set[str] = set()
        self._retired: collections.deque[Version] = collections.deque(maxlen=RETIRED)

    async def start(self) -> None:
        """Load all models. Raises UsageError if there is none, or one cannot be served."""
        places = self._places()
        if not places:
            raise UsageError(
                f"models: {self._options.models} holds no model, expected NAME.onnx or "
                "NAME/VERSION/model.onnx"
            )
        self._models = {name: _Model() for name in sorted(places)}
        await asyncio.gather(*(self._load(name, places[name]) for name in self._models))

    def versions(self) -> Iterator[Version]:
        """The versions that are served, of each model one."""
        for model in self._models.values():
            if model.current is not None:
                yield model.current

    def counted(self) -> list[Version]:
        """Versions whose counts are shown: those that are served, and the last ones before."""
        return [*self.versions(), *self._old, *self._retired]

    def loads(self) -> Iterator[tuple[str, str, int]]:
        """How often a file of each model was loaded, by name and outcome."""
        for name, model in self._models.items():
            for outcome, count in model.loads.items():
                yield name, outcome, count

    @property
    def names(self) -> list[str]:
        """Names of all models, also of those that are not loaded."""
        return list(self._models)

    @property
    def ready(self) -> bool:
        """Whether the models that are served can be used; one that is loaded, or cannot be, does
        not count, as the others go on."""
        served = list(self.versions())
        return bool(served) and all(version.engine.ready for version in served)

    @property
    def stuck(self) -> bool:
        """Whether a batch hangs."""
        return any(version.engine.stuck for version in self.versions())

    def find(self, name: str = "", version: str = "") -> Version:
        """A version by name, of the first model without one. Raises Refused with 404 or 503."""
        name = name or next(iter(self._models), "")
        model = self._models.get(name)
        if model is None:
            hint = did_you_mean(name, self._models)
            raise Refused(404, f"unknown model {name[:100]!r}{hint}")
        current = model.current
        for old in [each for each in self._old if each.name == name]:
            if version and old.version == version and old.engine.ready:
                return old
        if current is None:
            reason = model.reason or "it is not loaded"
            raise Refused(503 if model.wanted else 404, f"model {name!r}: {reason}")
        if version and version != current.version:
            raise Refused(
                404, f"unknown version {version[:20]!r} of {name!r}, served is {current.version}"
            )
        return current

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """The statistics of the protocol, of one model or of all. Raises Refused as `find` does."""
        versions = [self.find(name, version)] if name else self.versions()
        found = [
            each.statistics.to_json(each.name, each.version, each.engine.counts)
            for each in versions
        ]
        return {"model_stats": found}

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """The repository index of the protocol, or of it only what is `ready`."""
        entries = []
        for name, model in self._models.items():
            if model.current is not None:
                entry = {"name": name, "version": model.current.version, "state": "READY"}
                entries.append({**entry, "reason": ""})
            if (model.current is None or model.reason) and not ready:
                version = model.failed_version
                state = "LOADING" if model.state == "LOADING" else "UNAVAILABLE"
                entry = {"name": name, "version": version, "state": state}
                entries.append({**entry, "reason": model.reason})
        return entries

    async def reload(self) -> None:
        """Load what is new or has changed since, one model after the other."""
        try:
            places = await asyncio.to_thread(self._places)
        except (DistclsError, OSError) as error:
            log.warn(f"models are not reloaded: {error}")
            return
        for name, place in places.items():
            model = self._models.setdefault(name, _Model())
            if model.wanted and model.stamp != place.stamp:
                with contextlib.suppress(DistclsError):  # said and in the index
                    await self._load(name, place)

    async def watch(self, seconds: float) -> None:
        """Reload every so many seconds, for ever."""
        while True:
            await asyncio.sleep(seconds)
            await self.reload()

    async def load(self, name: str) -> None:
        """Load a model because a client wants it; raises Refused if there is none or it fails."""
        place = (await asyncio.to_thread(self._places)).get(name)
        if place is None:
            raise Refused(404, f"unknown model {name[:100]!r}: there is no file of it")
        model = self._models.setdefault(name, _Model())
        if model.current is not None and model.stamp == place.stamp:
            return
        model.wanted = True
        try:
            await self._load(name, place)
        except DistclsError as error:
            raise Refused(400, f"model {name!r} cannot be loaded: {error}") from error

    async def unload(self, name: str) -> None:
        """Stop serving a model; requests that have begun are finished."""
        model = self._models.get(name)
        if model is None:
            raise Refused(404, f"unknown model {name[:100]!r}")
        async with model.lock:
            model.wanted, model.stamp, model.state, model.reason = (
                False,
                None,
                "UNLOADED",
                "unloaded",
            )
            if model.current is not None:
                self._old.append(model.current)
                self._retire(model.current)
            model.current = None

    async def close(self, timeout: float) -> None:
        """Finish what is under way and end all engines."""
        current = [version.engine.close(timeout) for version in self.versions()]
        await asyncio.gather(*current, *self._closing, return_exceptions=True)

    async def _load(self, name: str, place: _Place) -> None:
        """Open the version at a place beside the one that is served, then switch.

        Raises DistclsError with the reason if it cannot be served.
        """
        model = self._models[name]
        async with model.lock:
            before = model.current
            if before is not None and model.stamp == place.stamp:
                return  # another call has loaded it meanwhile
            version = place.version or str(1 + int(before.version if before else 0))
            model.stamp, model.state = place.stamp, "LOADING"
            engine = self._engine(place.path, before)
            try:
                await engine.start()
            except (DistclsError, LaneDied, BatchFailed, OSError) as error:
                await engine.close(0)
                model.state, model.reason, model.failed_version = "UNAVAILABLE", str(error), version
                model.loads["refused"] += 1
                if before is not None:
                    log.warn(f"{place.path} is not served, version {before.version} stays: {error}")
                if isinstance(error, DistclsError):
                    raise
                raise DistclsError(f"{place.path}: {error}") from error
            model.current = Version(name, version, engine, self._options.max_images)
            model.state, model.reason, model.failed_version = "READY", "", ""
            model.loads["served"] += 1
            if before is not None:
                self._old.append(before)
                log.say(f"{name}: version {version} is served, from {place.path}")
                self._retire(before, engine)

    def _retire(self, version: Version, after: Engine | None = None) -> None:
        """End a version that is no longer served once its requests are finished, and all lanes of
        the engine `after` it are open."""

        async def close() -> None:
            await asyncio.sleep(0)  # whoever found it in this turn submits first
            if after is not None:
                await after.wait_for_lanes()
            await version.engine.close(DRAIN_OLD)
            self._old.remove(version)
            self._retired.append(version)

        task = asyncio.get_running_loop().create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _engine(self, path: Path, before: Version | None) -> Engine:
        """An engine for a file, which has to take and give what the version before it did."""
        like = None
        if before is not None:
            task = dataclasses.replace(before.interface.task, thresholds=None)
            like = {"size": list(before.interface.size), "task": task.to_json()}
        request, most = {**self._options.request, "like": like}, self._options.max_wait
        if self._options.engine == "threads":
            return Engine(_Threads(path, request).open, most)
        file = _descriptor(path)
        engine = Engine(functools.partial(_open_process, path, request, file), most)
        if file is not None:
            weakref.finalize(engine, os.close, file)
        return engine

    def _places(self) -> dict[str, _Place]:
        """The newest version of each model on disk."""
        options = self._options
        if options.model is not None:
            path = options.model
            # by its own name: a link called `current` leads elsewhere tomorrow
            own = os.path.abspath(path)  # noqa: PTH100 - keeps links
            name = options.name or (Path(own).name if path.is_dir() else path.stem)
            file = path / "best.onnx" if path.is_dir() else path
            return {_checked_name(name): _Place(path, None, _stamp(file))}
        assert options.models is not None
        if not options.models.is_dir():
            raise UsageError(f"models: {options.models} is no folder")
        found: dict[str, _Place] = {}
        for path in sorted(options.models.iterdir()):
            place = None
            if path.suffix == ".onnx" and path.is_file():
                place = _Place(path, None, _stamp(path))
            elif path.is_dir():
                place = _newest(path)
            name = path.stem if path.suffix == ".onnx" else path.name
            if place is None:
                continue
            if NAME.fullmatch(name) is None:
                self._say_once(f"{path} is left out: its name cannot be part of a URL")
                continue
            found[name] = place
        return found

    def _say_once(self, warning: str) -> None:
        if warning not in self._said:
            self._said.add(warning)
            log.warn(warning)


def _descriptor(path: Path) -> int | None:
    """The model file, opened: what lies at its path may be replaced before a process is started
    again. None for what cannot be opened, which the process says better."""
    if path.is_dir():
        file, checkpoint = path / "best.onnx", path / "best.pth"
        if checkpoint.exists() and _stamp(checkpoint)[2] > _stamp(file)[2]:
            return None
        path = file
    try:
        return regular_descriptor(path)
    except (OSError, ValueError):
        return None


async def _open_process(
    path: Path, request: dict[str, Any], file: int | None, first: dict[str, Any]
) -> Lane:
    """A compute process; `first` are the facts of the first one, which the others follow."""
    if first:
        request = {**request, "execution": first["execution"], "batch_size": first["batch_size"]}
    return await ProcessLane.open(path, request, file)


class _Threads:
    """Opens threads that share one session."""

    def __init__(self, path: Path, request: dict[str, Any]) -> None:
        self._path, self._request = path, request
        self._computer: Any = None

    async def open(self, first: dict[str, Any]) -> Lane:
        """A thread, warmed up. Raises UsageError if the model cannot be opened."""
        from distcls.serving import compute

        if self._computer is None:
            opening = functools.partial(compute.Computer.open, self._path, self._request)
            self._computer = await asyncio.to_thread(opening)
        seconds = await asyncio.to_thread(self._computer.warm_up)
        return LocalLane(self._computer, seconds, compute.memory())


def _newest(folder: Path) -> _Place | None:
    """The highest version in the folder of a model."""
    numbers = sorted(
        (int(each.name) for each in folder.iterdir() if each.name.isdecimal()), reverse=True
    )
    for number in numbers:
        for name in MODEL_FILES:
            file = folder / str(number) / name
            if file.is_file():
                return _Place(file, str(number), _stamp(file))
    return None


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _checked_name(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise UsageError(
            f"name: {name!r} cannot be part of a URL, expected letters, digits, _, - and .; "
            "--name gives another"
        )
    return name
