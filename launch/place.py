"""Where a rank stands in the network, and errors that say what to check from there."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import socket
import threading
from collections.abc import Iterator

from distcls import log
from distcls.errors import DistclsError, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """This process and its meeting point, known before it has met the others."""

    host: str
    address: str
    """Of the meeting point: MASTER_ADDR."""
    port: str
    interface: str
    """Name and address of the interface that leads there: `eth0 10.0.0.7`."""

    @classmethod
    def look(cls) -> Place:
        """Raises UsageError if the launcher named no meeting point, or if no route leads there."""
        alone = log.world_size() == 1
        address = os.environ.get("MASTER_ADDR", "127.0.0.1" if alone else "")
        port = os.environ.get("MASTER_PORT", "0" if alone else "")
        if not address or not port:
            raise UsageError(
                "MASTER_ADDR and MASTER_PORT are not set; start the processes with accelerate "
                "launch, torchrun or launch/slurm.sh"
            )
        host = socket.gethostname()
        return cls(host=host, address=address, port=port, interface=interface_to(address))

    @contextlib.contextmanager
    def within(self, seconds: float, doing: str) -> Iterator[None]:
        """Let the block fail, or hang, with an error that says what to check.

        A collective hangs in C code, where no exception reaches it: then the process ends.
        """

        def message(why: str) -> str:
            return f"{doing}: {why} on {self.host}; {self.advice()}"

        def end() -> None:
            log.fail(message(f"no answer within {seconds:g} s"))
            os._exit(DistclsError.exit_code)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are of this kind
            reason = str(error).strip().partition("\n")[0]
            raise DistclsError(message(f"failed with {reason!r}")) from error
        finally:
            timer.cancel()

    def advice(self) -> str:
        """What to look at when the ranks do not reach each other from here."""
        text = (
            f"check that all {log.world_size()} processes run, that port {self.port} of "
            f"{self.address} is open to {self.host} and taken by no other job, and that "
            f"{self.interface} is the interface to use (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
            "name another)"
        )
        listening = _gloo_address()
        if listening is not None and ipaddress.ip_address(listening).is_loopback:
            name = self.interface.split()[0]
            text += (
                f"; the name {self.host} leads to {listening}, which other machines cannot reach: "
                f"without GPUs set GLOO_SOCKET_IFNAME={name}"
            )
        return text


def interface_to(address: str) -> str:
    """Name and address of the interface that leads to `address`, such as `eth0 10.0.0.7`.

    Raises UsageError if the address has no meaning here or nothing leads there.
    """
    import psutil

    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # chooses a route and sends nothing
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(
            f"MASTER_ADDR: {address!r} cannot be reached from {socket.gethostname()}: "
            f"{error.strerror}; give an address of rank 0 that this machine knows"
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == own for entry in addresses):
            return f"{name} {own}"
    return own


def _gloo_address() -> str | None:
    """Where gloo listens, unless it is told to or all ranks are on this machine: by its name."""
    on_one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == log.world_size()
    if on_one_machine or "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
