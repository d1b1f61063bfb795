"""Reading image files within limits, and telling the machine's faults from the image's.

Only regular files are read, and no more than DISTCLS_MAX_BYTES of one: a pipe would wait for ever,
a device or a sparse file fills the memory, and what the kernel makes up when it is read (in /proc)
may do either or fail. What the machine lacks for a moment (memory, file
descriptors, a network file system that answers with an error) is tried again, then ends the run:
an image that could not be read because of it would silently be missing. A read that hangs, as on a
dead network file system, cannot be ended, but whoever waits for it can: see `result_of`.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import functools
import itertools
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from distcls.errors import BadImage, MachineError, UsageError
from distcls.stored import regular_descriptor
from distcls.system import memory_limit

S = TypeVar("S")
T = TypeVar("T")

MAX_BYTES = 1 << 28
"""Bytes of one image file, or of one answer of a server, unless DISTCLS_MAX_BYTES is set."""
BYTES_LIMIT = "DISTCLS_MAX_BYTES"
"""Environment variable with another limit, for every command alike."""
MOST_BYTES = 1 << 40

WAITS = (0.1, 0.4, 1.5)
"""Seconds before each further attempt after a fault of the machine."""
_OF_THE_IMAGE = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EILSEQ, errno.EOVERFLOW),
    )
)
"""What opening or reading says of the file itself. Without permission see `_is_forbidden`."""
READ_TIMEOUT = 300
"""Seconds that reading one file may take, unless DISTCLS_READ_TIMEOUT is set."""
READ_LIMIT = "DISTCLS_READ_TIMEOUT"
MOST_SECONDS = 1 << 20
CHECK_EVERY = 0.5
"""Seconds between two looks at how long files have been read."""
LEAVE_AFTER = 5.0

MOUNTS = Path("/proc/self/mountinfo")
_OF_THE_KERNEL = frozenset(
    (
        *("proc", "sysfs", "debugfs", "tracefs", "cgroup", "cgroup2", "configfs", "securityfs"),
        *("pstore", "bpf", "binfmt_misc", "mqueue", "efivarfs", "fusectl", "selinuxfs"),
    )
)
"""File systems in which nothing is stored."""

_reading: dict[int, tuple[str | os.PathLike[str], float]] = {}
"""The file that each thread reads, and since when."""
_ALLOCATE = re.compile(r"allocate (\d+) bytes")
_spent = threading.local()


def byte_limit() -> int:
    """The most bytes of one image file. Raises UsageError if it is set wrongly."""
    return limit_of(BYTES_LIMIT, MAX_BYTES, MOST_BYTES)


def limit_of(variable: str, default: int, most: int) -> int:
    """A limit that an environment variable may set. Raises UsageError for what is none."""
    text = os.environ.get(variable)
    return default if not text else _parse_limit(variable, text, most)


@functools.lru_cache(8)
def _parse_limit(variable: str, text: str, most: int) -> int:
    plain = text.replace("_", "")
    limit = int(plain) if plain.isdecimal() and len(plain) <= 20 else 0
    if not 1 <= limit <= most:
        raise UsageError(f"{variable}: {text!r}, expected a whole number from 1 to {most:,}")
    return limit


def read_file(path: str | os.PathLike[str], offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or `size` of them from `offset` on.

    Raises BadImage with the reason for a file that is missing, not regular or larger than
    DISTCLS_MAX_BYTES; MachineError where the machine fails.
    """
    thread = threading.get_ident()
    _reading[thread] = path, time.monotonic()
    try:
        return patiently(lambda: _read_once(path, offset, size))
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # a zero byte in the name
        raise BadImage(f"cannot be read: {error}") from error
    finally:
        _, began = _reading.pop(thread)
        _spent.seconds = seconds_reading() + time.monotonic() - began


def seconds_reading() -> float:
    """Seconds that this thread has spent in `read_file` so far."""
    return float(getattr(_spent, "seconds", 0.0))


def result_of(future: Future[T]) -> T:
    """The result of a future that reads files, in any thread, and what else it does.

    Raises MachineError, naming a file, once one has been read for more than DISTCLS_READ_TIMEOUT.
    """
    while not future.done() and not wait((future,), CHECK_EVERY).done:
        now, limit = time.monotonic(), limit_of(READ_LIMIT, READ_TIMEOUT, MOST_SECONDS)
        for path, began in list(_reading.values()):
            if now - began > limit:
                raise MachineError(
                    f"{os.fsdecode(path)}: not read within {limit} s, the storage hangs; the "
                    f"environment variable {READ_LIMIT} sets the limit"
                )
    return future.result()


def in_order(function: Callable[[S], T], items: Iterable[S], workers: int) -> Iterator[T]:
    """What a function that reads files returns for each item, in order, from several threads.

    A few items are taken ahead. Raises what the function raises, and MachineError as `result_of`.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="distcls-read")
    waiting: collections.deque[Future[T]] = collections.deque()
    left = iter(items)
    try:
        waiting.extend(pool.submit(function, item) for item in itertools.islice(left, 2 * workers))
        while waiting:
            found = result_of(waiting[0])
            waiting.popleft()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(left, 1))
            yield found
    except BaseException as error:
        leave(pool, waiting, error)
        raise
    pool.shutdown()


def leave(pool: ThreadPoolExecutor, pending: Iterable[Future[Any]], error: object) -> None:
    """End a pool after an error of its owner: what has not begun is dropped.

    Reads under way get 5 s, on Ctrl-C and faults of the machine none; one that hangs is left
    behind. Its thread has to be called distcls-..., so that the command does not wait for it at its
    end.
    """
    pool.shutdown(wait=False, cancel_futures=True)
    hurry = isinstance(error, KeyboardInterrupt | MachineError)
    under_way = [future for future in pending if not future.cancelled()]
    if not wait(under_way, 0 if hurry else LEAVE_AFTER).not_done:
        pool.shutdown()


def _read_once(path: str | os.PathLike[str], offset: int, size: int | None) -> bytes:
    handle = regular_descriptor(path)
    try:
        status = os.fstat(handle)
        length = status.st_size
        if not status.st_blocks and (kind := _kernel_file_system(status.st_dev)):
            raise OSError(errno.EINVAL, f"not a stored file but one of the kernel ({kind})")
        wanted = length if size is None else size
        require_bytes(wanted)
        if offset:
            os.lseek(handle, offset, os.SEEK_SET)
        data = os.read(handle, wanted + (size is None))
        if len(data) == wanted:
            return data
        return _read_on(handle, data, byte_limit() if size is None else size)
    finally:
        os.close(handle)


@functools.lru_cache(64)
def _kernel_file_system(device: int) -> str:
    """The name of a file system of the kernel's own; empty for all others."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = MOUNTS.read_text(errors="replace")
    except OSError:  # no Linux
        return ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [number]:
            kind = after.split(" ", 1)[0]
            return kind if kind in _OF_THE_KERNEL else ""
    return ""


def _read_on(handle: int, data: bytes, most: int) -> bytes:
    """The rest: of a file that says another size than it has (some of FUSE), or in pieces."""
    parts, total = [data], len(data)
    while data and total <= most:
        data = os.read(handle, min(1 << 20, most + 1 - total))
        parts.append(data)
        total += len(data)
    require_bytes(total)
    return b"".join(parts)[:most]


def require_bytes(size: int) -> None:
    """Raise BadImage for more bytes than are read of one image."""
    limit = byte_limit()
    if size > limit:
        raise BadImage(
            f"too large: {size:,} bytes, at most {limit:,} are read; the environment variable "
            f"{BYTES_LIMIT} sets the limit"
        )


def patiently(call: Callable[[], T], pixels: int | None = None) -> T:
    """What `call` returns; after a fault of the machine it is called again, three times.

    Raises MachineError then, and at once whatever else `call` raises. `pixels` are those of the
    image that is decoded: asking for far more memory than these is a fault of the image.
    """
    for pause in (*WAITS, None):
        try:
            return call()
        except (OSError, MemoryError, cv2.error) as error:
            reason = _machine_fault(error, pixels)
            if reason is None:
                raise
            if pause is None:
                raise MachineError(
                    f"{reason} ({len(WAITS) + 1} attempts); this is a fault of the machine, not of "
                    "the image, so the run ends"
                ) from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _machine_fault(error: Exception, pixels: int | None) -> str | None:
    """What the machine lacks; None for an error that is not its own."""
    if isinstance(error, MemoryError):
        return "not enough memory to read and decode it"
    if isinstance(error, OSError):
        if error.errno is None or error.errno in _OF_THE_IMAGE or _is_forbidden(error):
            return None
        return f"cannot be read: {error.strerror}"
    if getattr(error, "code", 0) != cv2.Error.StsNoMem:
        return None
    found = _ALLOCATE.search(str(error))
    if found and pixels is not None and int(found[1]) > (1 << 26) + 64 * pixels:
        return None
    return f"not enough memory to decode it{f' ({found[0]})' if found else ''}"


def _is_forbidden(error: OSError) -> bool:
    """Whether this user may not read the file, now as well as in a moment."""
    if error.errno not in (errno.EACCES, errno.EPERM) or error.filename is None:
        return False
    return not os.access(error.filename, os.R_OK)


class MemoryBudget:
    """Bounds what images that are decoded at the same time take, whatever the number of threads.

    An image waits while others are being decoded and there is no room. Large ones count until
    their arrays are freed. Where no other is being decoded one may always begin, so nothing waits
    for ever: not for arrays that a caller keeps, nor for an image larger than the budget.
    """

    LARGE = 1 << 25
    """Bytes of an array that counts until it is freed."""
    HUGE = 1 << 28
    """Bytes of decoding after which the C library is asked to give back what it keeps for each
    thread: eight threads kept 2 GiB of progressive JPEGs of 100 megapixels."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.used = 0
        self._decoding = 0
        self._turn = threading.Condition(threading.RLock())  # freed arrays come by here, anywhere
        os.register_at_fork(after_in_child=self._reset)

    @contextlib.contextmanager
    def reserve(self, size: int) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
        """A block that decodes an image in about `size` bytes; what it gives takes the array."""
        with self._turn:
            while self._decoding and self.used + size > self.size:
                self._turn.wait()
            self._decoding += 1
            self.used += size
        try:
            yield self._keep
        finally:
            if size >= self.HUGE:
                _trim()
            with self._turn:
                self._decoding -= 1
                self._free(size)

    def _keep(self, image: NDArray[np.uint8]) -> None:
        if image.nbytes >= self.LARGE:
            with self._turn:
                self.used += image.nbytes
            weakref.finalize(image, self._free, image.nbytes).atexit = False

    def _free(self, size: int) -> None:
        with self._turn:
            self.used = max(0, self.used - size)  # 0 in a child whose parent reserved it
            self._turn.notify_all()

    def _reset(self) -> None:
        """After a fork no thread of the parent decodes any more."""
        self._turn = threading.Condition(threading.RLock())
        self._decoding = 0
        self.used = 0


def _trim() -> None:
    """Return free memory to the system, where the C library is glibc; some milliseconds."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def memory_budget() -> MemoryBudget:
    """That of this process: an eighth of its memory, at least 256 MiB."""
    return MemoryBudget(max(1 << 28, memory_limit() // 8))
