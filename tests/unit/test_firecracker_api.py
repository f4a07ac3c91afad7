"""What is said to Firecracker's API, to a real server that holds each request against the published definition.

The server knows the definition and the order of a machine's life, and is no Firecracker: this says nothing of a boot.
"""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

import firecracker_api
import pytest
from test_firecracker_plan import document, plan

from ringfence.errors import SandboxError
from ringfence.runtime.microvm import fcapi
from ringfence.runtime.microvm.fcapi import Api

WAIT_S = 10
FRESH, RUNNING, PAUSED = "Not started", "Running", "Paused"


class Server(ThreadingUnixStreamServer):
    """Answers as the definition says; what it does not allow, or not now, is a 400 with a reason."""

    daemon_threads = True

    def __init__(self, path: str) -> None:
        self.state = FRESH
        self.asked: list[tuple[str, str, object]] = []
        super().__init__(path, Handler)

    def refusal(self, method: str, path: str, body: object) -> str:
        """Why not, "" if it was done."""
        wrong = firecracker_api.problem(method, path, body)
        if wrong:
            return wrong
        if method == "GET":
            return ""
        if isinstance(body, dict) and body.get("action_type") == "FlushMetrics":
            return "" if self.state != FRESH else "not started"
        if method == "PATCH" and path == "/vm":
            assert isinstance(body, dict)
            return self._move(RUNNING if body["state"] == "Paused" else PAUSED, body["state"])
        if path == "/snapshot/create":
            return "" if self.state == PAUSED else "not paused"
        if self.state != FRESH:
            return "too late"
        if path in ("/actions", "/snapshot/load"):
            self.state = PAUSED if isinstance(body, dict) and body.get("resume_vm") is False else RUNNING
        return ""

    def _move(self, wanted: str, word: str) -> str:
        if self.state != wanted:
            return f"is {self.state}"
        self.state = PAUSED if word == "Paused" else RUNNING
        return ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, self.path, body))
        why = self.server.refusal(self.command, self.path, body)
        status = 400 if why else firecracker_api.status(self.command, self.path)
        said: object = {"fault_message": why} if why else None
        if not why and self.path == "/":
            said = {"app_name": "x", "id": "x", "state": self.server.state, "vmm_version": "1.7.0"}
        if not why and self.path == "/version":
            said = {"firecracker_version": "1.7.0"}
        content = b"" if said is None else json.dumps(said).encode()
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_PATCH = _serve

    def log_message(self, *_: object) -> None:
        return

    def address_string(self) -> str:
        return "unix"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(str(tmp_path / "api")) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join(WAIT_S)


@pytest.fixture
def api(server: Server) -> Iterator[Api]:
    found = Api(fcapi.connect(os.getpid(), str(server.server_address)))
    yield found
    found.close()


def test_a_machines_life(server: Server, api: Api) -> None:
    """Made, started, paused, saved, resumed: each request is one of the definition's, and its state can be asked."""
    made = document(plan(limits__io__read="1MiB/s"))
    assert (api.version(), api.state()) == ("1.7.0", FRESH)
    api.configure(made)  # type: ignore[arg-type]
    api.start()
    api.flush_metrics()
    assert api.state() == RUNNING
    api.pause()
    api.save(state_path="/run/state", memory_path="/run/memory")
    assert api.state() == PAUSED
    api.resume()
    bodies = {path: body for method, path, body in server.asked if method == "PUT"}
    assert bodies["/machine-config"] == made["machine-config"]
    assert bodies["/drives/vda"] == made["drives"][0]
    assert {f"/{name}" for name in made if name != "drives"} <= set(bodies)


@pytest.mark.parametrize("resume", [True, False])
def test_a_saved_machine_is_loaded(server: Server, api: Api, resume: bool) -> None:
    """Loading is allowed on a fresh Firecracker; the machine runs at once only when it should."""
    api.load(state_path="/s", memory_path="/m", resume=resume)
    assert server.state == (RUNNING if resume else PAUSED)
    with pytest.raises(SandboxError, match="too late"):
        api.load(state_path="/s", memory_path="/m", resume=resume)


def test_a_refusal_has_firecrackers_own_words(api: Api) -> None:
    """What is refused says which request it was, and why; the connection goes on."""
    with pytest.raises(SandboxError, match="Firecracker refuses PATCH /vm: is Not started"):
        api.pause()
    assert api.state() == FRESH


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/vsock", {"guest_cid": 2, "uds_path": "/x"}),
        ("PUT", "/drives/vda", {"drive_id": "vda", "is_root_device": False, "colour": "red"}),
        ("PUT", "/nowhere", {}),
        ("PATCH", "/vm", None),
    ],
)
def test_the_server_would_notice(method: str, path: str, body: object) -> None:
    """The double refuses what the definition does not have."""
    assert firecracker_api.problem(method, path, body) != ""


Talks = Callable[[bytes], Api]


@pytest.fixture
def talks() -> Iterator[Talks]:
    """An API whose other end has already said something, and hung up."""
    ends: list[socket.socket] = []

    def say(answer: bytes) -> Api:
        ours, theirs = socket.socketpair()
        ends.extend((ours, theirs))
        threading.Thread(target=_say, args=(theirs, answer), daemon=True).start()
        return Api(ours)

    yield say
    for end in ends:
        end.close()


def _say(sock: socket.socket, answer: bytes) -> None:
    try:
        sock.sendall(answer)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 100,
        b"SSH-2.0-hello\r\n",
        OK,
        OK + b"Content-Length: 100000000\r\n\r\n" + b"x" * 300_000,
        OK + b"Content-Length: -1\r\n\r\n{}",
        OK + b"X: y\r\n" * 100_000,
        OK + b"X: " + b"y" * 1_000_000,
        OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffff\r\n" + b"x" * 300_000,
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        OK + b"Content-Length: 5\r\n\r\n" + b"[[[[[",
        OK + b"Content-Length: 2\r\n\r\n{}",
        OK + b'Content-Length: 12\r\n\r\n{"state": 1}',
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
        b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
        b'HTTP/1.1 400 No\r\nContent-Length: 22\r\n\r\n{"fault_message": [1]}',
    ],
    ids=range(16),
)
def test_whatever_answers(talks: Talks, answer: bytes) -> None:
    """The other end may be in a guest's hands: every answer that is none is one error, soon, and without much room."""
    with pytest.raises(SandboxError) as error:
        talks(answer).state()
    assert len(str(error.value)) < 500


def test_an_answer_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is bounded for an answer as a whole, not for each of its bytes."""
    ours, theirs = socket.socketpair()
    stopped = threading.Event()

    def drip() -> None:
        while not stopped.wait(0.02):
            try:
                theirs.sendall(b"H")
            except OSError:
                return

    thread = threading.Thread(target=drip)
    with ours, theirs:
        thread.start()
        api = Api(ours)
        with pytest.raises(SandboxError, match="does not answer"):
            api._ask("GET", "/", timeout_s=0.3)
        stopped.set()
        thread.join(WAIT_S)


def test_a_symlink_leads_nowhere(server: Server, tmp_path: Path) -> None:
    """What the VMM puts in the place of its socket does not lead to a socket of the host's."""
    link = tmp_path / "link"
    link.symlink_to(str(server.server_address))
    with pytest.raises(SandboxError, match="cannot be reached"):
        fcapi.connect(os.getpid(), str(link))
    with pytest.raises(SandboxError, match="cannot be reached"):
        fcapi.connect(os.getpid(), str(tmp_path / "absent"))
