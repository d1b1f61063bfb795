"""A server that is attacked, killed, overloaded, or given bad models: each really caused."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcls.errors import BadImage
from distcls.imaging import decode
from distcls.system import available_cores
from tests.pictures import encode, smooth
from tests.serving import EXPORTED, PHOTO, WHOLE, Answer, Server, encoded, form, serving, together

PARTS = {"DISTCLS_IMPORT": "tests.serving_parts"}
"""Environment in which images can crash or delay the compute processes."""
WHITE = encode(np.full((28, 28, 3), 255, np.uint8), "PNG")
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--header-timeout", 1, "--body-timeout", 3, "--max-body", 1)
    with serving(tmp_path_factory.mktemp("serve"), *options) as server:
        yield server


FRAGILE = ("--workers", 2, "--max-wait", 60)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve"), *FRAGILE, env=PARTS) as server:
        yield server


@pytest.fixture
def fragile(shared: Server) -> Server:
    """Two compute processes that certain images crash or delay."""
    wait_for_processes(shared, 2)
    return shared


def wait_for_processes(server: Server, number: int) -> None:
    end = time.monotonic() + 20
    while f'distcls_workers{{model="best",version="1"}} {number}.0' not in metrics(server):
        assert time.monotonic() < end, server.said
        time.sleep(0.02)


def metrics(server: Server) -> str:
    return server.get("/metrics").body.decode()


def predicted(answer: Answer) -> float:
    assert answer.status == 200, answer
    return float(answer.json["predictions"][0]["probability"])


def bomb() -> bytes:
    """A JPEG of some hundred bytes that says it has 65,000 x 65,000 pixels."""
    small = encode(smooth(8, 8), "JPEG")
    at = small.index(b"\xff\xc0") + 5
    return small[:at] + b"\xfd\xe8\xfd\xe8" + small[at + 4 :]


BAD = {
    "truncated": PHOTO[: len(PHOTO) // 2],
    "bomb": bomb(),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "text": b"hello",
}


@pytest.mark.row(16, 17, 18)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_has_the_verdict_of_every_command(server: Server, name: str) -> None:
    with pytest.raises(BadImage) as caught:
        decode(BAD[name])
    answer = server.post("/predict", BAD[name], headers=JPEG)
    assert (answer.status, answer.error) == (400, str(caught.value))
    files = [("good.jpg", PHOTO), (f"{name}.jpg", BAD[name])]
    body, headers = form(files)
    rows = server.post("/predict", body, headers=headers).json["predictions"]
    assert [row["error"] for row in rows] == [None, str(caught.value)]


@pytest.mark.row(22)
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 40_000 + b"\r\n",
        HEAD + b"Content-Length: x\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2/models/%ff%00/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
        b"GET /card?" + b"a=1&" * 5000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
)
def test_malformed_http_is_refused_and_hurts_nobody(server: Server, data: bytes) -> None:
    found = server.raw(data)
    assert not found or found.split()[1][:1] == b"4", found[:200]
    assert server.get("/v2/health/ready").status == 200


@pytest.mark.row(23)
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunks"])
def test_the_refusal_of_a_large_body_is_read_by_the_client(server: Server, chunked: bool) -> None:
    block = os.urandom(1 << 16)

    def ask(index: int) -> None:
        for _ in range(3):
            body = (block for _ in range(128)) if chunked else block * 128
            answer = server.request("POST", "/predict", body, JPEG)  # an iterable comes in chunks
            assert (answer.status, "1 MB" in answer.error) == (413, True)

    assert together(4, ask) == [None] * 4


@pytest.mark.row(24)
def test_slow_and_silent_clients_are_closed_and_hurt_nobody(server: Server) -> None:
    address = ("127.0.0.1", server.port)
    silent = [socket.create_connection(address, timeout=20) for _ in range(64)]
    slow_header = [socket.create_connection(address, timeout=20) for _ in range(8)]
    slow_body = [socket.create_connection(address, timeout=20) for _ in range(8)]
    for connection in slow_header:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost:")
    for connection in slow_body:
        connection.sendall(HEAD + b"Content-Length: 50000\r\n\r\n" + PHOTO[:100])
    began = time.monotonic()
    taken = []
    while time.monotonic() - began < 0.8:
        one = time.monotonic()
        predicted(server.post("/predict", PHOTO))
        taken.append(time.monotonic() - one)
    assert np.percentile(taken, 99) < 0.5
    for connection in (*silent, *slow_header):
        assert b"HTTP/1.1 2" not in _rest(connection)
    for connection in slow_body:
        assert b" 408 " in _rest(connection).splitlines()[0]
    assert time.monotonic() - began < 12
    assert server.get("/v2/health/ready").status == 200


def _rest(connection: socket.socket) -> bytes:
    found = b""
    with connection:
        try:
            while part := connection.recv(65536):
                found += part
        except ConnectionResetError:
            pass
    return found


@pytest.mark.row(24)
def test_a_client_that_does_not_read_is_closed(tmp_path: Path) -> None:
    with serving(tmp_path, "--write-timeout", 0.5, "--engine", "threads") as server:
        request = b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n"
        size = len(server.get("/docs").body)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.settimeout(20)
            with pytest.raises((ConnectionResetError, BrokenPipeError)):
                _send_slowly(connection, [request] * (100_000_000 // size))
        assert server.get("/v2/health/ready").status == 200


def _send_slowly(connection: socket.socket, requests: list[bytes]) -> None:
    for request in requests:  # whose answers are more than the system holds in between
        connection.sendall(request)
        time.sleep(0.0002)
    connection.recv(1)


@pytest.mark.row(24)
def test_too_many_connections_and_requests_on_one(tmp_path: Path) -> None:
    limits = ("--max-connections", 8, "--header-timeout", 0.5, "--engine", "threads")
    with serving(tmp_path, *limits) as server, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        held = [stack.enter_context(socket.create_connection(address)) for _ in range(8)]
        answer = server.get("/v2/health/live")
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.error == "busy: too many connections are open"
        held[0].sendall(b"GET / HTTP/1.1\r\nHost:")
        head, _, body = _rest(held[0]).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert json.loads(body)["error"].startswith("the headers came too slowly")
        assert server.get("/v2/health/live").status == 200  # the silent ones are closed as well
        # all in one segment: beyond the limit the connection ends
        assert server.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n" * 300).count(b"200 OK") <= 101
        page = server.get("/metrics").body.decode()
        assert 'distcls_rejected_total{reason="slow_body"} 1.0' in page


@pytest.mark.row(22)
@pytest.mark.parametrize(
    ("data", "status", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 40_000 + b"\r\n", 431, "headers"),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000, 431, "headers are larger than 65,536"),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400, "not valid HTTP"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n", 400, "not valid HTTP"),
    ],
)
def test_what_is_no_http_is_said(server: Server, data: bytes, status: int, text: str) -> None:
    head, _, body = server.raw(data).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert text in json.loads(body)["error"]
    # a request before it is answered first; alone, if it still waits when the other is refused
    found = server.raw(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n" + data)
    answers = [int(answer[:3]) for answer in found.split(b"HTTP/1.1 ")[1:]]
    assert answers in ([200], [200, status])


def test_pipelined_requests_are_answered_in_their_order(server: Server) -> None:
    asked = [b"GET /v2/health/live", b"HEAD /v2", b"GET /v2/models/none", b"GET /v2/models"]
    data = b"".join(line + b" HTTP/1.1\r\nHost: x\r\n\r\n" for line in asked)
    found = server.raw(data + b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answers = found.split(b"HTTP/1.1 ")[1:]
    assert [int(answer[:3]) for answer in answers] == [200, 200, 404, 200, 200]
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in answers]
    assert bodies[1] == b""
    assert [b"live" in bodies[0], b"error" in bodies[2], b"models" in bodies[3]] == [True] * 3
    assert b"name" in bodies[4]


@pytest.mark.row(25)
def test_too_much_is_refused_at_once_and_the_rest_served(tmp_path: Path) -> None:
    options = ("--workers", 1, "--batch-size", 1, "--max-wait", 0.3)
    with serving(tmp_path, *options, env=PARTS) as server:
        slow = b"SLEEP!" + PHOTO
        for _ in range(6):  # it learns what such an image costs
            predicted(server.post("/predict", slow, headers=JPEG))

        def ask(index: int) -> tuple[float, Answer]:
            time.sleep(0.01 * index)
            began = time.monotonic()
            return time.monotonic() - began, server.post("/predict", slow, headers=JPEG)

        answers = [answer for _, answer in together(20, ask)]
        refused = [answer for answer in answers if answer.status == 503]
        served = [answer for answer in answers if answer.status == 200]
        assert len(refused) + len(served) == 20
        assert len(refused) > 10
        assert len(served) >= 1
        assert all(1 <= int(answer.headers["retry-after"]) < 10 for answer in refused)
        assert "busy" in refused[0].error
        time.sleep(0.1)
        predicted(server.post("/predict", PHOTO))


@pytest.mark.row(25)
def test_many_images_in_a_request_wait_no_longer(tmp_path: Path) -> None:
    """Bodies that are read at the same time are weighed again when their images are known."""
    options = ("--workers", 1, "--batch-size", 1, "--max-wait", 0.3)
    with serving(tmp_path, *options, env=PARTS) as server:
        slow = b"SLEEP!" + PHOTO
        for _ in range(6):
            predicted(server.post("/predict", slow, headers=JPEG))
        body, headers = form([("a", slow)] * 3)
        answers = together(8, lambda _: server.post("/predict", body, headers=headers))
        served = [answer for answer in answers if answer.status == 200]
        assert {answer.status for answer in answers} == {200, 503}
        assert 1 <= len(served) <= 3  # all eight would take 12 s
        rows = [row for answer in served for row in answer.json["predictions"]]
        assert max(row["seconds"]["queue"] for row in rows) < 4


@pytest.mark.row(25)
def test_a_request_of_many_images_takes_turns_with_others(tmp_path: Path) -> None:
    options = ("--workers", 1, "--batch-size", 1, "--max-wait", 60)
    with serving(tmp_path, *options, env=PARTS) as server:
        body, headers = form([("a", b"SLEEP!" + PHOTO)] * 8)
        with ThreadPoolExecutor(1) as pool:
            many = pool.submit(server.post, "/predict", body, headers=headers)
            time.sleep(0.3)
            began = time.monotonic()
            predicted(server.post("/predict", PHOTO))
            taken = time.monotonic() - began
            assert not many.done()
            rows = many.result().json["predictions"]
        assert [row["error"] for row in rows] == [None] * 8
        assert taken < 3 * rows[0]["seconds"]["decode"]  # not behind all eight


@pytest.mark.row(30)
@pytest.mark.slow
def test_processes_that_hang_are_replaced(fragile: Server) -> None:
    for pid in fragile.processes():
        os.kill(pid, signal.SIGSTOP)
    answers: list[Any] = []
    asking = threading.Thread(
        target=lambda: answers.extend(together(3, lambda _: fragile.post("/predict", PHOTO)))
    )
    asking.start()
    began, statuses = time.monotonic(), []
    while asking.is_alive():
        statuses.append(fragile.get("/v2/health/ready").status)
        time.sleep(0.5)
    assert 503 in statuses
    assert time.monotonic() - began < 60
    assert {answer.status for answer in answers} <= {200, 504}
    assert "no answer within 30 s" in fragile.said
    wait_for_processes(fragile, 2)
    predicted(fragile.post("/predict", PHOTO))


@pytest.mark.row(25)
def test_a_deadline_that_cannot_be_met(fragile: Server) -> None:
    slow = threading.Thread(
        target=together,
        args=(4, lambda _: fragile.post("/predict", b"SLEEP!" + PHOTO, headers=JPEG)),
    )
    slow.start()
    time.sleep(0.2)
    body, headers = encoded([PHOTO], parameters={"timeout": 50_000})
    began = time.monotonic()
    answer = fragile.post("/v2/models/best/infer", body, headers=headers)
    assert (answer.status, time.monotonic() - began < 0.4) == (504, True)
    slow.join()
    assert 'reason="deadline"' in metrics(fragile)


@pytest.mark.row(26)
def test_clients_that_hang_up_leave_nothing_behind(fragile: Server) -> None:
    together(2, lambda _: fragile.post("/predict", PHOTO))
    request = HEAD + b"Content-Length: %d\r\n\r\n" % (len(PHOTO) + 6) + b"SLEEP!" + PHOTO

    def ask(_: int) -> None:
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", fragile.port)) as connection:
                connection.sendall(request)

    images = computed(fragile)
    before = descriptors(fragile)
    assert together(8, ask) == [None] * 8
    began = time.monotonic()
    predicted(fragile.post("/predict", PHOTO))
    assert time.monotonic() - began < 20  # computing all of them would take 100 s
    time.sleep(1.2)
    assert descriptors(fragile) <= before + 4
    assert computed(fragile) - images < 100  # of 400: those that had begun when their clients left
    assert 'route="/predict",status="499"' in metrics(fragile)


def computed(server: Server) -> int:
    """Images that were computed, whether or not anybody waited for them."""
    [stats] = server.get("/v2/models/best/stats").json["model_stats"]
    sizes = [(each["batch_size"], each["compute_infer"]["count"]) for each in stats["batch_stats"]]
    return sum(size * count for size, count in sizes)


def descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


class Load:
    """Clients that ask without a pause while a block runs; all answers are kept."""

    def __init__(self, server: Server, clients: int, image: bytes = PHOTO) -> None:
        self.answers: list[Any] = []
        self._server, self._image = server, image
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self._server.post("/predict", self._image, headers=JPEG))
            except OSError as error:
                self.answers.append(error)
                if self._server.process.poll() is not None:
                    return

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.row(27)
def test_a_new_model_is_loaded_under_load_without_a_failed_request(tmp_path: Path) -> None:
    file = tmp_path / "best.onnx"
    shutil.copy(WHOLE, file)
    with serving(tmp_path, "--reload", 0.1, "--max-wait", 60, model=file) as server:
        with Load(server, 4) as load:
            shutil.copy(WHOLE, tmp_path / "new.onnx")
            (tmp_path / "new.onnx").replace(file)
            wait_for_version(server, "2")
            time.sleep(0.3)
        assert {type(answer) for answer in load.answers} == {Answer}
        assert {answer.status for answer in load.answers} == {200}
        versions = [answer.json["version"] for answer in load.answers]
        assert set(versions) == {"1", "2"}
        assert len({predicted(answer) for answer in load.answers}) == 1
        lines = metrics(server).splitlines()
        counts = [line for line in lines if line.startswith("nv_inference_request_success{")]
        served = sum(float(line.split()[-1]) for line in counts)  # nothing is lost with a version
        assert served == len(load.answers)
        end = time.monotonic() + 10
        while len(server.processes()) > available_cores():
            assert time.monotonic() < end, "the old processes stay"
            time.sleep(0.05)
        assert server.get("/v2/models/best/versions/1/ready").status == 404


def wait_for_version(server: Server, version: str) -> None:
    end = time.monotonic() + 20
    while server.get("/card").json["version"] != version:
        assert time.monotonic() < end, server.said
        time.sleep(0.05)


@pytest.mark.row(28, 20)
def test_bad_new_models_leave_the_old_one(tmp_path: Path) -> None:
    file, new = tmp_path / "best.onnx", tmp_path / "new.onnx"
    shutil.copy(WHOLE, file)
    data = WHOLE.read_bytes()
    middle = len(data) // 2
    faults: list[bytes | None] = [  # cut, flipped, of other classes, gone
        *(data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]),
        *((EXPORTED / "run_labels" / "best.onnx").read_bytes(), None),
    ]
    with serving(tmp_path, model=file) as server:
        for number, content in enumerate(faults, 1):
            if content is None:
                file.unlink()
            else:
                new.write_bytes(content)
                new.replace(file)
            server.process.send_signal(signal.SIGHUP)
            end = time.monotonic() + 20
            while server.said.count("is not served") < number:
                assert time.monotonic() < end, server.said
                predicted(server.post("/predict", PHOTO))
            index = server.post("/v2/repository/index").json
            assert [entry["state"] for entry in index] == ["READY", "UNAVAILABLE"]
            assert index[1]["reason"]
            loads = 'distcls_model_loads_total{model="best",outcome="refused"}'
            assert f"{loads} {number}.0" in metrics(server)
            assert server.get("/v2/health/ready").status == 200
            assert server.get("/card").json["version"] == "1"
            assert "Traceback" not in server.said


@pytest.mark.row(29)
def test_sigterm_under_load_loses_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-delay", 0.5, "--max-wait", 60, env=PARTS) as server:
        with Load(server, 6, b"SLEEP!" + PHOTO) as load:
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert server.get("/v2/health/ready").status == 503
            assert server.get("/v2/health/live").status == 200
            assert server.process.wait(30) == 0
        answers = [answer for answer in load.answers if isinstance(answer, Answer)]
        errors = [error for error in load.answers if not isinstance(error, Answer)]
        assert {answer.status for answer in answers} <= {200, 503}
        served = [answer for answer in answers if answer.status == 200]
        assert len(served) >= 6
        assert all("shutting down" in answer.error for answer in answers if answer not in served)
        assert all(isinstance(error, ConnectionError) for error in errors)
        assert "stopped" in server.said


@pytest.mark.row(29)
def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    with (
        serving(tmp_path, *FRAGILE, env=PARTS) as server,
        Load(server, 2, b"SLEEP!" + PHOTO),
    ):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0


@pytest.mark.row(30)
def test_a_killed_compute_process_loses_no_request(fragile: Server) -> None:
    expected = predicted(fragile.post("/predict", PHOTO))
    with Load(fragile, 8) as load:
        for _ in range(3):
            os.kill(fragile.processes()[0], signal.SIGKILL)
            time.sleep(0.5)
        wait_for_processes(fragile, 2)
    assert {type(answer) for answer in load.answers} == {Answer}
    assert {predicted(answer) for answer in load.answers} == {expected}
    assert "signal 9" in fragile.said


@pytest.mark.row(30)
def test_not_ready_while_there_is_no_compute_process(fragile: Server) -> None:
    for pid in fragile.processes():
        os.kill(pid, signal.SIGSTOP)  # a new one cannot be confused with them
    for pid in fragile.processes():
        os.kill(pid, signal.SIGKILL)
    statuses = []
    end = time.monotonic() + 20
    while not (503 in statuses and statuses[-1] == 200):
        statuses.append(fragile.get("/v2/health/ready").status)
        assert time.monotonic() < end, statuses
    predicted(fragile.post("/predict", PHOTO))


@pytest.mark.row(28, 30)
def test_processes_start_again_with_the_file_that_was_proven(tmp_path: Path) -> None:
    """Another file lies at its path meanwhile, and was refused."""
    file = tmp_path / "best.onnx"
    shutil.copy(WHOLE, file)
    with serving(tmp_path, "--workers", 2, "--max-wait", 60, model=file) as server:
        wait_for_processes(server, 2)
        expected = predicted(server.post("/predict", PHOTO))
        shutil.copy(EXPORTED / "run_labels" / "best.onnx", tmp_path / "new.onnx")
        (tmp_path / "new.onnx").replace(file)
        server.process.send_signal(signal.SIGHUP)
        for pid in server.processes()[:2]:
            os.kill(pid, signal.SIGKILL)
        assert predicted(server.post("/predict", PHOTO)) == expected
        wait_for_processes(server, 2)
        assert predicted(server.post("/predict", PHOTO)) == expected


@pytest.mark.row(27)
def test_an_upload_that_began_before_a_new_model_is_answered(tmp_path: Path) -> None:
    file = tmp_path / "best.onnx"
    shutil.copy(WHOLE, file)
    with serving(tmp_path, "--reload", 0.1, model=file) as server:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        head = HEAD + b"Content-Length: %d\r\n\r\n" % len(PHOTO)
        connection.sendall(head + PHOTO[:100])
        shutil.copy(WHOLE, tmp_path / "new.onnx")
        (tmp_path / "new.onnx").replace(file)
        wait_for_version(server, "2")
        end = time.monotonic() + 3
        while len(server.processes()) > available_cores() and time.monotonic() < end:
            time.sleep(0.05)
        connection.sendall(PHOTO[100:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()


@pytest.mark.row(24)
def test_slow_uploads_keep_nobody_out(server: Server) -> None:
    address = ("127.0.0.1", server.port)
    slow = [socket.create_connection(address, timeout=20) for _ in range(300)]
    for connection in slow:
        connection.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + bytes(20_000))
    for _ in range(20):
        predicted(server.post("/predict", PHOTO))
    for connection in slow:
        connection.close()


@pytest.mark.row(31)
def test_only_the_image_that_crashes_the_decoder_fails(fragile: Server) -> None:
    expected = predicted(fragile.post("/predict", PHOTO))
    images = [PHOTO] * 4 + [b"CRASH!"] + [PHOTO] * 4
    with Load(fragile, 4) as load:
        body, headers = form([(str(place), image) for place, image in enumerate(images)])
        rows = fragile.post("/predict", body, headers=headers).json["predictions"]
    assert [row["error"] is None for row in rows] == [image == PHOTO for image in images]
    assert "ends the process" in rows[4]["error"]
    assert {row["probability"] for row in rows if row["error"] is None} == {expected}
    assert {predicted(answer) for answer in load.answers} == {expected}
    wait_for_processes(fragile, 2)
    deaths = fragile.said.count("a compute process ended")
    again = fragile.post("/predict", b"CRASH!", headers=JPEG)
    assert (again.status, "two processes" in again.error) == (400, True)
    assert fragile.said.count("a compute process ended") == deaths


@pytest.mark.row(31)
def test_only_the_image_that_the_model_cannot_compute_fails(fragile: Server) -> None:
    images = [PHOTO] * 5 + [WHITE] + [PHOTO] * 2
    body, headers = form([(str(place), image) for place, image in enumerate(images)])
    rows = fragile.post("/predict", body, headers=headers).json["predictions"]
    assert [row["error"] for row in rows] == [None] * 5 + ["a white image"] + [None] * 2
    assert fragile.post("/predict", WHITE).status == 500


def test_a_client_may_keep_its_connection(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(3):
        connection.request("POST", "/predict", PHOTO)
        found = connection.getresponse()
        assert (found.status, found.will_close) == (200, False)
        found.read()
    connection.close()
