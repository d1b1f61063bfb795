"""The batching queue: images of many requests, in batches, to whoever is free to compute.

It lives in one event loop, so nothing is locked. A free lane takes what is there at once, up to
the batch size, and no timer delays anything: alone, an image never waits. With s(b) seconds for a
batch of b and C lanes, an image behind q others waits at most ceil(q / (C b)) s(b) + s(b).

Where batches are much faster than as many single images (GPUs), a lane takes all that waits. Where
they are not (MobileNetV3 on a CPU: 6 % for two, 8 % for four), a batch makes its first image wait
for its last: so a lane takes one or two, and more only from a queue that is long. Measured on two
cores at 0.7 of what `distcls predict` does, 99th percentile of the latency: 124 ms with all that
waits, 92 ms one by one, and about a fifth less than that in pairs.

A lane is a compute process (`ProcessLane`) or a thread of this process (`LocalLane`). Processes are
the default: a decoder that crashes ends one batch, whose images are tried once more, each alone.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distcls import log
from distcls.errors import DistclsError, UsageError
from distcls.serving.work import (
    HEADER,
    MOST_ANSWER,
    BatchFailed,
    Fault,
    Output,
    Work,
    pack_batch,
    unpack_outputs,
)

BATCH_TIMEOUT = 30.0
"""Seconds after which a batch counts as hung, and its process is ended."""
SLOW_BATCH = 10.0
"""Seconds after which a lane is no longer counted on while its batch lasts."""
START_TIMEOUT = 300.0
"""Seconds that a process may take to open a model."""
RESPAWN_AFTER = (0.0, 0.5, 2.0, 10.0)
"""Seconds before a process that ended is started again, by the failures in a row."""
POISON_SECONDS = 600.0
"""For how long an image that ended two processes is refused without another try."""
MOST_PIXELS = 100_000_000
"""Pixels of the files in one batch, which are decoded one after the other: some seconds."""
EAGER = 1.3
"""How much faster a batch has to be than as many single images, for lanes to take all there is."""
SMOOTHING = 0.1
"""Weight of the newest batch or image in the measured costs."""


class Busy(Exception):
    """Too much is waiting already."""

    def __init__(self, backlog: float) -> None:
        super().__init__(f"busy: {backlog:.2f} s of work are waiting")
        self.backlog = backlog


class DeadlineMissed(Exception):
    """No lane was free before the request's deadline."""


class EngineClosed(Exception):
    """The model is being unloaded, or the server stops."""


class LaneDied(Exception):
    """What was computing ended, or hangs; the text is how."""


class Lane(Protocol):
    """Whatever computes one batch at a time."""

    facts: dict[str, Any]
    """What `Computer.describe` says, and its measured `seconds` and `memory`."""

    async def run(self, batch: Sequence[Work]) -> list[Output]:
        """The outputs of a batch. Raises BatchFailed, or LaneDied."""

    async def close(self) -> None:
        """End it; nothing is under way."""


OpenLane = Callable[[dict[str, Any]], Awaitable[Lane]]


class _Job:
    """A request: its images and the outputs so far."""

    def __init__(
        self, works: Sequence[Work], loop: asyncio.AbstractEventLoop, deadline: float | None
    ) -> None:
        self.deadline = deadline
        self.outputs: list[Output | None] = [None] * len(works)
        self.left = len(works)
        self.done: asyncio.Future[None] = loop.create_future()
        self.began = time.monotonic()
        self.waited = 0.0

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def finish(self, place: int, output: Output) -> None:
        self.outputs[place] = output
        self.left -= 1
        if self.left == 0 and not self.done.done():
            self.done.set_result(None)


@dataclasses.dataclass(eq=False, slots=True)
class _Entry:
    """One image of a request, in the queue."""

    job: _Job
    place: int
    work: Work
    cost: float
    pixels: int
    """Of its file; 0 if it is decoded already."""
    alone: bool = False
    """It was in a batch that ended a process, and is tried once more."""


class _Queue:
    """Images that wait: requests take turns, so that one of many images delays the others little.

    Images that are tried again come before all.
    """

    def __init__(self) -> None:
        self._again: collections.deque[_Entry] = collections.deque()
        self._turns: collections.deque[collections.deque[_Entry]] = collections.deque()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, entries: Sequence[_Entry]) -> None:
        """The images of a request."""
        self._turns.append(collections.deque(entries))
        self._length += len(entries)

    def retry(self, entries: Sequence[_Entry]) -> None:
        """Images that a lane has lost."""
        self._again.extendleft(reversed(entries))
        self._length += len(entries)

    def peek(self) -> _Entry:
        """The next one."""
        return self._again[0] if self._again else self._turns[0][0]

    def take(self) -> _Entry:
        """The next one, which is removed; its request has its turn again after all others."""
        self._length -= 1
        if self._again:
            return self._again.popleft()
        request = self._turns.popleft()
        entry = request.popleft()
        if request:
            self._turns.append(request)
        return entry

    def holds(self, job: _Job) -> bool:
        """Whether images of a request wait."""
        waiting = itertools.chain(self._again, (request[0] for request in self._turns))
        return any(entry.job is job for entry in waiting)


@dataclasses.dataclass
class Counts:
    """What the engine has done, for the metrics."""

    batches: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Batches computed, by their size."""
    infer_ns: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Nanoseconds of computing them."""
    decode_ns: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Nanoseconds of decoding their images."""
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Images that were not computed: cancelled, deadline."""
    deaths: int = 0
    """Processes that ended by themselves."""


class Engine:
    """The queue of one model version, and its lanes."""

    def __init__(self, open_lane: OpenLane, max_wait: float) -> None:
        """`open_lane` opens a lane, and is given the facts of the first one (at first none).

        `max_wait` are the seconds of work that may be waiting when a request is admitted.
        """
        self._open_lane = open_lane
        self._wanted = 1
        self.max_wait = max_wait
        self.counts = Counts()
        self.facts: dict[str, Any] = {}
        self.lanes: list[Lane] = []
        self._free: list[Lane] = []
        self._queue = _Queue()
        self._work_s = 0.0  # cost of what waits and of what is computed
        self._image_s, self._decode_s, self._pixels = 0.01, 0.001, 200_000.0
        self._eager = False
        self._jobs: set[_Job] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._poison: dict[bytes, float] = {}
        self._oldest: dict[Lane, float] = {}
        self._failures = 0
        self._closed = False

    async def start(self) -> None:
        """Open the first lane, then the others behind it. Raises DistclsError if it cannot open."""
        await self._add_lane()
        self._wanted = self.facts["execution"]["streams"]
        for _ in range(self._wanted - 1):
            self._background(self._add_lane_or_retry())

    async def wait_for_lanes(self, timeout: float = 60.0) -> None:
        """Until all lanes are open, the seconds are over, or the engine is closed."""
        end = time.monotonic() + timeout
        while len(self.lanes) < self._wanted and time.monotonic() < end and not self._closed:
            await asyncio.sleep(0.01)

    @property
    def ready(self) -> bool:
        """Whether new requests are taken and a lane is there that does not hang."""
        return not self._closed and any(self._lasts(lane) <= SLOW_BATCH for lane in self.lanes)

    @property
    def waiting(self) -> int:
        """Images that no lane has taken."""
        return len(self._queue)

    @property
    def stuck(self) -> bool:
        """Whether all lanes hang for longer than it takes to end and replace them."""
        lasting = [self._lasts(lane) for lane in self.lanes]
        return bool(lasting) and min(lasting) > BATCH_TIMEOUT + SLOW_BATCH

    def _lasts(self, lane: Lane) -> float:
        """Seconds for which a lane has computed its batch; 0 if it has none."""
        began = self._oldest.get(lane)
        return 0.0 if began is None else time.monotonic() - began

    @property
    def backlog(self) -> float:
        """Seconds until an image that comes now would be begun, as measured so far."""
        return self._work_s / max(1, len(self.lanes))

    def require_room(self) -> None:
        """Raise Busy if more than `max_wait` seconds of work are waiting, EngineClosed at its end.

        Nothing is reserved for what is still being read: slow clients would keep out the others.
        """
        if self._closed:
            raise EngineClosed
        if self.backlog > self.max_wait:
            raise Busy(self.backlog)

    async def submit(
        self, works: Sequence[Work], sizes: Sequence[int], deadline: float | None = None
    ) -> tuple[list[Output], float]:
        """The outputs of the images of a request, in order, and the seconds that they waited.

        `sizes` are the pixels of their files, 0 for those that are decoded already. `deadline` is a
        time of the monotonic clock before which all have to be begun. Cancelling drops those that
        have not. Raises Busy, DeadlineMissed and EngineClosed.
        """
        self.require_room()  # again: others came while its body was read
        loop = asyncio.get_running_loop()
        job = _Job(works, loop, deadline)
        self._jobs.add(job)
        entries = [
            _Entry(job, place, work, self._image_s + self._decode_cost(pixels), pixels)
            for place, (work, pixels) in enumerate(zip(works, sizes, strict=True))
        ]
        self._work_s += sum(entry.cost for entry in entries)
        self._queue.add(entries)
        self._dispatch()
        timer = None
        if deadline is not None:
            timer = loop.call_later(max(0, deadline - time.monotonic()), self._expire, job)
        try:
            await job.done
        finally:
            if timer is not None:
                timer.cancel()
            job.done.cancel()  # of what is not done: its images are dropped
            self._jobs.discard(job)
        return [output for output in job.outputs if output is not None], job.waited

    def _expire(self, job: _Job) -> None:
        if self._queue.holds(job):
            job.fail(DeadlineMissed())

    def _dispatch(self) -> None:
        while self._free and (batch := self._take()):
            lane = self._free.pop()
            self._background(self._run(lane, batch))

    def _take(self) -> list[_Entry]:
        """The next batch: what waits, divided among the lanes that are free."""
        size = self.facts["batch_size"]
        length = len(self._queue)
        if self._eager:
            wanted = math.ceil(length / len(self._free))
        else:
            wanted = math.ceil(length / (2 * len(self.lanes)))
        wanted = min(size, wanted)
        batch: list[_Entry] = []
        pixels = 0
        while self._queue and len(batch) < wanted:
            entry = self._queue.peek()
            pixels += entry.pixels
            if batch and (entry.alone or pixels > MOST_PIXELS):
                break
            self._queue.take()
            if entry.job.done.done():  # the client left, or the deadline has passed
                cancelled = entry.job.done.cancelled()
                self.counts.dropped["cancelled" if cancelled else "deadline"] += 1
                self._work_s = max(0.0, self._work_s - entry.cost)
                continue
            batch.append(entry)
            if entry.alone:
                break
        return batch

    async def _run(self, lane: Lane, batch: list[_Entry]) -> None:
        began = time.monotonic()
        self._oldest[lane] = began
        for entry in batch:
            entry.job.waited = max(entry.job.waited, began - entry.job.began)
        try:
            await self._compute(lane, batch)
        except LaneDied as death:
            self._oldest.pop(lane, None)
            self._lost(lane, batch, str(death))
            return
        except Exception as error:  # a bug of ours, and only in this batch
            for entry in batch:
                entry.job.fail(error)
        finally:
            self._oldest.pop(lane, None)
            self._work_s = max(0.0, self._work_s - sum(entry.cost for entry in batch))
        self._failures = 0
        if self._closed and not self._queue:
            return
        if lane in self.lanes:
            self._free.append(lane)
        self._dispatch()

    async def _compute(self, lane: Lane, batch: list[_Entry]) -> None:
        """Compute a batch; where that fails, halves of it, until the image at fault is alone."""
        try:
            outputs = await lane.run([entry.work for entry in batch])
        except BatchFailed as error:
            if len(batch) == 1:
                self._finish_with_error(batch[0], str(error), "model")
                return
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                await self._compute(lane, half)
            return
        size, spent = len(batch), sum(output.decode_s for output in outputs)
        self.counts.batches[size] += 1
        self.counts.infer_ns[size] += int(1e9 * outputs[0].infer_s)
        self.counts.decode_ns[size] += int(1e9 * spent)
        self._learn(batch, outputs)
        for entry, output in zip(batch, outputs, strict=True):
            entry.job.finish(entry.place, output)

    def _decode_cost(self, pixels: int) -> float:
        """Seconds to decode an image: as many times the mean as it is larger, but a small one takes
        as long for its header."""
        return self._decode_s * max(0.25, pixels / self._pixels) if pixels else 0.0

    def _learn(self, batch: list[_Entry], outputs: list[Output]) -> None:
        """Follow the measured costs of computing and decoding an image, and its size."""
        self._image_s += SMOOTHING * (outputs[0].infer_s / len(batch) - self._image_s)
        for entry, output in zip(batch, outputs, strict=True):
            if not entry.work.pixels:
                self._decode_s += SMOOTHING * (output.decode_s - self._decode_s)
                self._pixels += SMOOTHING * (entry.pixels + 1 - self._pixels)

    def _finish_with_error(self, entry: _Entry, reason: str, fault: Fault) -> None:
        blank = np.full(len(self.facts["card"]["classes"]), np.nan, np.float32)
        entry.job.finish(entry.place, Output(blank, error=reason, fault=fault))

    def _lost(self, lane: Lane, batch: list[_Entry], how: str) -> None:
        """A lane died with a batch: its images are tried once more, each alone."""
        if self._closed:
            for entry in batch:
                entry.job.fail(EngineClosed())
            return
        again = []
        for entry in batch:
            if entry.alone:
                self._poison[_digest(entry.work)] = time.monotonic() + POISON_SECONDS
                reason = f"it ends the process that decodes it ({how})"
                self._finish_with_error(entry, reason, "image")
            elif entry.job.done.done() or entry.job.outputs[entry.place] is not None:
                continue
            elif (entry.job.deadline or math.inf) < time.monotonic():
                entry.job.fail(DeadlineMissed())
            else:
                again.append(dataclasses.replace(entry, alone=True))
        self._work_s += sum(entry.cost for entry in again)
        self._queue.retry(again)
        self.remove(lane, how)

    def remove(self, lane: Lane, how: str) -> None:
        """Forget a lane that ended by itself, and open another."""
        if lane not in self.lanes:
            return
        self.lanes.remove(lane)
        if lane in self._free:
            self._free.remove(lane)
        if self._closed:
            return
        self.counts.deaths += 1
        self._failures += 1
        log.warn(f"a compute process ended ({how}); it is started again")
        self._background(lane.close())
        self._background(self._add_lane_or_retry())

    def is_poison(self, work: Work) -> bool:
        """Whether these bytes have ended two processes lately."""
        if not self._poison:
            return False
        now = time.monotonic()
        self._poison = {key: until for key, until in self._poison.items() if until > now}
        return _digest(work) in self._poison

    async def _add_lane(self) -> None:
        lane = await self._open_lane(self.facts)
        if self._closed:
            await lane.close()
            return
        if self.facts and lane.facts["sha256"] != self.facts["sha256"]:
            await lane.close()
            raise UsageError("the model file has changed since the others opened it")
        if not self.facts:
            single, batch = lane.facts["seconds"], lane.facts["batch_seconds"]
            self._image_s = single
            self._eager = single * lane.facts["batch_size"] > EAGER * batch
        self.facts = self.facts or lane.facts
        self.lanes.append(lane)
        self._free.append(lane)
        if isinstance(lane, ProcessLane):
            self._background(self._watch(lane))
        self._dispatch()

    async def _watch(self, lane: ProcessLane) -> None:
        code = await lane.process.wait()
        if lane not in self._oldest:  # else whoever waits for its batch sees it
            self.remove(lane, _how_ended(code))

    async def _add_lane_or_retry(self) -> None:
        while not self._closed:
            await asyncio.sleep(RESPAWN_AFTER[min(self._failures, len(RESPAWN_AFTER) - 1)])
            try:
                await self._add_lane()
                return
            except (DistclsError, LaneDied, OSError) as error:
                self._failures += 1
                log.warn(f"a compute process does not start: {error}")

    def _background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self, timeout: float = 30.0) -> None:
        """Take nothing more, finish what waits for at most `timeout` seconds, end the lanes."""
        end = time.monotonic() + timeout
        while (self._queue or self._oldest) and time.monotonic() < end and self.lanes:
            await asyncio.sleep(0.005)
        self._closed = True
        self._queue = _Queue()
        lanes, self.lanes, self._free = self.lanes, [], []
        for lane in lanes:
            await lane.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in self._jobs:
            job.fail(EngineClosed())


class LocalLane:
    """A thread of this process."""

    def __init__(self, computer: Any, seconds: tuple[float, float], memory: int) -> None:
        self._computer = computer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="serve")
        single, batch = seconds
        facts = {"seconds": single, "batch_seconds": batch, "memory": memory}
        self.facts = {**computer.describe(), **facts}

    async def run(self, batch: Sequence[Work]) -> list[Output]:
        """See `Lane`; a thread does not die."""
        loop = asyncio.get_running_loop()
        return list(await loop.run_in_executor(self._pool, self._computer.run, batch))

    async def close(self) -> None:
        """See `Lane`."""
        self._pool.shutdown(wait=False)


class ProcessLane:
    """A compute process, and the socket between it and the server."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        facts: dict[str, Any],
    ) -> None:
        self.process = process
        self.facts = facts
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(
        cls, path: Path, request: dict[str, Any], file: int | None = None
    ) -> ProcessLane:
        """Start a process that opens the model at `path` as `request` says (see `Computer.open`).

        `file` is a descriptor of the model file, whatever lies at its path meanwhile.

        Raises UsageError or DistclsError with its reason if it cannot, LaneDied if it ends
        without one.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "distcls.serving.compute", str(path)),
                *(json.dumps({**request, "file": file}), str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # standard output is the user's, for results
                pass_fds=[theirs.fileno(), *([] if file is None else [file])],
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
        lane = cls(process, reader, writer, {})
        try:
            facts, _ = await asyncio.wait_for(lane._receive(), START_TIMEOUT)
        except BaseException:
            await lane.close()
            raise
        if "error" in facts:
            await lane.close()
            kind = UsageError if facts["usage"] else DistclsError
            raise kind(str(facts["error"]))
        lane.facts = facts
        return lane

    async def run(self, batch: Sequence[Work]) -> list[Output]:
        """See `Lane`."""
        try:
            self._writer.writelines(pack_batch(batch))
            async with asyncio.timeout(BATCH_TIMEOUT):
                meta, arrays = await self._receive()
            return unpack_outputs(meta, arrays, len(batch))
        except TimeoutError:
            self._kill()
            raise LaneDied(f"no answer within {BATCH_TIMEOUT:.0f} s") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._kill()
            raise LaneDied(f"{type(error).__name__}: {error}") from error

    async def _receive(self) -> tuple[dict[str, Any], bytes]:
        """The next message. Raises LaneDied at the end of the stream."""
        try:
            text, arrays = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if text + arrays > MOST_ANSWER:
                raise ValueError(f"an answer of {text + arrays:,} bytes")
            message = await self._reader.readexactly(text + arrays)
            return json.loads(message[:text]), message[text:]
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise LaneDied(_how_ended(await self.process.wait())) from error

    async def close(self) -> None:
        """See `Lane`; the process ends by itself when its socket is closed."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        try:
            await asyncio.wait_for(self.process.wait(), 5)
        except TimeoutError:
            self._kill()
            await self.process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


def _digest(work: Work) -> bytes:
    return hashlib.sha256(work.data).digest()


def _how_ended(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
