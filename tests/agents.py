"""The agent as tests use it: built from the sources, started over its descriptors, and spoken to in frames."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from ringfence.sandbox import protocol
from ringfence.sandbox.protocol import (
    DETACH,
    EXITED,
    FAILED,
    PREPARED,
    READY,
    RELAY,
    TTY,
    Connection,
    encode_start,
)

ROOT = Path(__file__).resolve().parents[1]
ENV = [b"PATH=/usr/bin:/bin", b"LC_ALL=C"]
NOBODY = 54321  # a uid that owns nothing here
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--bounding-set=-all")
WAIT_S = 10
UNSHARE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@cache
def binary() -> str:
    """Return the agent's path, built from the sources that are tested."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "agent")], check=True)
    return str(ROOT / "agent/build/ringfence-agent")


class Frames:
    """A connection to the agent; a frame that is not the expected one is a failure."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        self.sock = sock
        self.connection = Connection(sock)

    def send(self, frame: bytes, descriptors: tuple[int, ...] = ()) -> None:
        self.connection.send(frame, descriptors)

    def expect(self, kind: int) -> tuple[bytes, list[int]]:
        frame = self.connection.recv()
        assert frame is not None, f"the agent closed, instead of {kind}"
        assert frame[0] == kind, f"{frame} instead of {kind}"
        assert frame[1] == 0
        return frame[2], frame[3]

    def ready(self) -> int:
        version, pid = protocol.decode_ready(self.expect(READY)[0])
        assert version == protocol.VERSION
        return pid

    def prepared(self) -> int:
        pid, descriptors = protocol.decode_prepared(self.expect(PREPARED)[0])
        assert descriptors == 3
        return pid

    def exited(self) -> tuple[int, int, int]:
        return protocol.decode_exited(self.expect(EXITED)[0])

    def failed(self) -> tuple[int, int]:
        return protocol.decode_failed(self.expect(FAILED)[0])

    def ended(self) -> bool:
        return self.connection.recv() is None

    def start(
        self, *argv: str | bytes, flags: int = 0, stdio: tuple[int, ...] | None = None, **more: object
    ) -> None:
        """START `argv`; without a pty or a log its stdin, stdout and stderr are the null device."""
        words = [os.fsencode(a) for a in argv]
        env = more.pop("env", ENV)
        cwd = more.pop("cwd", b"/")
        frame = encode_start(words, env, cwd, flags=flags, **more)  # type: ignore[arg-type]
        assert flags & RELAY == 0 or stdio is not None
        if stdio is None and not flags & (TTY | DETACH):
            with open(os.devnull, "r+b") as null:
                self.send(frame, (null.fileno(),) * 3)
        else:
            self.send(frame, stdio or ())

    def output(self, *argv: str | bytes, **more: object) -> bytes:
        """START `argv` with a pipe as stdout and return all that it writes, up to the end."""
        reading, writing = os.pipe()
        with open(reading, "rb") as pipe, open(os.devnull, "r+b") as null:
            self.start(*argv, stdio=(null.fileno(), writing, null.fileno()), **more)  # type: ignore[arg-type]
            os.close(writing)
            return pipe.read()


def spawn(command: list[str], descriptors: dict[int, int]) -> int:
    """Start `command` with `descriptors`, ours by theirs, and nothing else above 2; return its pid."""
    # High numbers first, so that none of theirs is overwritten before it is copied.
    high = {theirs: os.dup2(ours, 900 + theirs, inheritable=False) for theirs, ours in descriptors.items()}
    actions = [(os.POSIX_SPAWN_DUP2, fd, theirs) for theirs, fd in high.items()]
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    for fd in high.values():
        os.close(fd)
    return pid


class Agent(Frames):
    """A running agent: its control connection, its listener or feed, its process."""

    def __init__(self, command: list[str], directory: Path, *, feed: bool = False) -> None:
        ours, theirs = socket.socketpair()
        self.address = str(directory / "s")
        self.feed: socket.socket | None = None
        if feed:
            self.feed, listener = socket.socketpair()
        else:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self.address)
            listener.listen(64)
        self.pid = spawn(command, {3: theirs.fileno(), 4: listener.fileno()})
        theirs.close()
        listener.close()
        self.status: int | None = None
        self.clients: list[Frames] = []
        super().__init__(ours)

    def connect(self) -> Frames:
        if self.feed is not None:
            sock, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self.feed, [b"C"], [theirs.fileno()])
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.address)
        self.clients.append(Frames(sock))
        return self.clients[-1]

    def busy(self) -> None:
        """Start a main job that stays, and let it go: nothing else is served before."""
        self.start("sleep", "1000")
        self.prepared()

    def exec(self) -> Frames:
        """Connect, once the main job is let go, and wait for the agent's word."""
        frames = self.connect()
        frames.ready()
        return frames

    def wait(self) -> int:
        """The exit status; an agent that hangs fails the test."""
        if self.status is None:
            pidfd = os.pidfd_open(self.pid)
            with open(pidfd, closefd=True):
                assert select.select([pidfd], [], [], WAIT_S)[0], "the agent hangs"
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def host_pid(self) -> int:
        """PID 1 of the namespace, as the host numbers it."""
        return children(self.pid)[0]

    def close(self) -> None:
        for frames in (self, *self.clients):
            frames.connection.close()
        if self.feed is not None:
            self.feed.close()
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)  # unshare --kill-child takes PID 1 along, and so all
            os.waitpid(self.pid, 0)


def children(pid: int) -> list[int]:
    """Its children, as the host numbers them; none if it has just died."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def status_of(pid: int) -> dict[str, str]:
    return dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )


def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds; for what the kernel offers no event for."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def cpu_ticks(pid: int) -> int:
    """Processor time of a process, in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def parsed(data: bytes) -> list[tuple[int, bytes]]:
    """Stream and payload of all records of a log, which has nothing but whole ones."""
    found = list(protocol.read_log(data))
    assert (found[-1][0] if found else 0) == len(data), "half a record"
    return [(stream, payload) for _, _, stream, payload in found]


@contextlib.contextmanager
def starting(directory: Path) -> Iterator[Callable[..., Agent]]:
    """Give a function that starts agents; its words are put before the agent's own command line."""
    started: list[Agent] = []

    def start(*before: str, init: bool = True, feed: bool = False) -> Agent:
        place = directory / str(len(started))
        place.mkdir()
        agent = Agent([*(UNSHARE if init else []), *before, binary()], place, feed=feed)
        started.append(agent)
        return agent

    try:
        yield start
    finally:
        for agent in started:
            agent.close()
