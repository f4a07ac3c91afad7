"""Bridge, link and back (agent/LINK.md), joined on this host by a plain socket, with an ordinary agent behind them.

Where the guest is hostile, the test itself is the guest: a small program in the VMM's place gives it the link.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agents import (
    UNSHARE,
    WAIT_S,
    Frames,
    binary,
    children,
    cpu_ticks,
    eventually,
    parsed,
    spawn,
    status_of,
)
from ringfence.sandbox import protocol
from ringfence.sandbox.protocol import (
    DETACH,
    END,
    EXITED,
    HOLD,
    OUT_OF_MEMORY,
    PREPARED,
    READY,
    RELAY,
    REPORTED,
    TTY,
    encode_go,
    encode_report,
    encode_resize,
    encode_shutdown,
    encode_signal,
)

HELLO, SETUP, SETUP_DONE, SETUP_FAILED, OPEN, CLOSE, CONTROL = 1, 2, 3, 4, 8, 9, 10
DATA, END_OF, CREDIT, STOP, POWEROFF = 16, 17, 18, 19, 48
MACHINE = 0xFFFF
WINDOW_BYTES = 1 << 16
FIRST_WORDS_BYTES, LAST_WORDS_BYTES = 32 << 10, 16 << 10
SETUP_TEXT = b"hostname=guest\0uid=1000\0"
# In the VMM's place: gives its end of the link away over descriptor 8 and stays.
GIVE_LINK = """
import os, socket, sys, time
with socket.socket(fileno=8) as sock:
    socket.send_fds(sock, [b"L"], [int(sys.argv[1])])
os.close(int(sys.argv[1]))
MORE
time.sleep(1000)
"""


class Bridge(Frames):
    """A running bridge and what the host has of it: control socket, listener, words."""

    def __init__(
        self,
        directory: Path,
        vmm: list[str],
        *,
        log_bytes: int | str = 0,
        wait: int | str = 1,
        extra: int = -1,
    ) -> None:
        ours, theirs = socket.socketpair()
        self.address = str(directory / "control.sock")
        self.words = directory / "words"
        setup = directory / "setup"
        if not setup.exists():
            setup.write_bytes(SETUP_TEXT)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)
        words = os.open(self.words, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        descriptors = [
            theirs.fileno(),
            listener.fileno(),
            words,
            words,
            words,
            *([extra] if extra >= 0 else []),
        ]
        arguments = [str(log_bytes), str(setup), str(wait), str(len(descriptors) - 5), *vmm]
        self.pid = spawn(
            [*UNSHARE, binary(), "--bridge", *arguments], {3 + i: fd for i, fd in enumerate(descriptors)}
        )
        os.close(words)
        theirs.close()
        listener.close()
        self.status: int | None = None
        self.connections: list[Frames] = []
        super().__init__(ours)

    def host_pid(self) -> int:
        """The bridge itself, as the host numbers it."""
        eventually(lambda: children(self.pid))
        return children(self.pid)[0]

    def connect(self) -> Frames:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.address)
        self.connections.append(Frames(sock))
        return self.connections[-1]

    def exec(self) -> Frames:
        frames = self.connect()
        frames.ready()
        return frames

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """The exit status; a bridge that hangs fails the test."""
        if self.status is None:
            pidfd = os.pidfd_open(self.pid)
            with open(pidfd, closefd=True):
                assert select.select([pidfd], [], [], timeout_s)[0], "the bridge hangs"
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def lives(self, for_s: float = 0.1) -> bool:
        pidfd = os.pidfd_open(self.pid)
        with open(pidfd, closefd=True):
            return not select.select([pidfd], [], [], for_s)[0]

    def close(self) -> None:
        self.connection.close()
        for frames in self.connections:
            frames.connection.close()
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Guest:
    """The other end of the link in the hands of the test."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        self.sock = sock
        self.data = b""

    def send(self, kind: int, payload: bytes = b"", *, channel: int = MACHINE, stream: int = 0) -> None:
        self.raw(struct.pack("<IBBH", len(payload), kind, stream, channel) + payload)

    def raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def control(self, kind: int, payload: bytes, channel: int = 0) -> None:
        self.send(CONTROL, protocol.encode(kind, 0, payload), channel=channel)

    def recv(self) -> tuple[int, int, int, bytes] | None:
        """The next frame: type, stream, channel, payload; None at the end of the link."""
        while len(self.data) < 8 or len(self.data) < 8 + struct.unpack_from("<I", self.data)[0]:
            try:
                more = self.sock.recv(1 << 16)
            except ConnectionResetError:
                more = b""
            if not more:
                return None
            self.data += more
        length, kind, stream, channel = struct.unpack_from("<IBBH", self.data)
        payload, self.data = self.data[8 : 8 + length], self.data[8 + length :]
        return kind, stream, channel, payload

    def expect(self, kind: int, channel: int = MACHINE, stream: int = 0) -> bytes:
        frame = self.recv()
        assert frame is not None, f"the link has ended, instead of {kind}"
        assert frame[:3] == (kind, stream, channel), frame
        return frame[3]

    def hello(self, version: int = 1) -> None:
        self.send(HELLO, struct.pack("<II", version, 0) + b"6.1.0-test\x001234\0")

    def boot(self) -> None:
        self.hello()
        self.expect(SETUP)
        self.send(SETUP_DONE)

    def ready(self, channel: int = 0) -> None:
        self.control(READY, struct.pack("<II", 1, 1), channel)

    def prepared(self, channel: int = 0) -> None:
        self.control(PREPARED, struct.pack("<II", 7, 3), channel)

    def exited(self, code: int = 0, channel: int = 0) -> None:
        self.control(EXITED, struct.pack("<III", code, 0, 0), channel)

    def order(self, kind: int, channel: int = 0) -> bytes:
        frame = self.expect(CONTROL, channel)
        assert frame[4] == kind, frame
        return frame[8:]

    def ended(self) -> bool:
        """Read what is left; True at the end of the link."""
        while self.recv() is not None:
            continue
        return True


Bridges = Callable[..., Bridge]


@pytest.fixture
def bridges(tmp_path: Path) -> Iterator[Bridges]:
    """Start bridges; the VMM is the back on this host, with an agent behind it, unless `vmm` names another."""
    with contextlib.ExitStack() as stack:

        def start(vmm: list[str] | None = None, **more: object) -> Bridge:
            place = tmp_path / str(len(list(tmp_path.iterdir())))
            place.mkdir()
            bridge = Bridge(place, vmm or [binary(), "--back", "@LINK@"], **more)  # type: ignore[arg-type]
            stack.callback(bridge.close)
            return bridge

        yield start


Hostiles = Callable[..., tuple[Bridge, Guest]]


@pytest.fixture
def hostiles(bridges: Bridges) -> Iterator[Hostiles]:
    """Start bridges whose guest is the test."""
    with contextlib.ExitStack() as stack:

        def start(*, boot: bool = True, more: str = "", **others: object) -> tuple[Bridge, Guest]:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                program = GIVE_LINK.replace("MORE", more)
                vmm = [sys.executable, "-ISc", program, "@LINK@"]
                bridge = bridges(vmm, extra=theirs.fileno(), **others)
                ours.settimeout(WAIT_S)
                link = socket.recv_fds(ours, 1, 1)[1][0]
            guest = Guest(socket.socket(fileno=link))
            stack.callback(guest.sock.close)
            if boot:
                guest.boot()
                guest.ready()
                bridge.ready()
            return bridge, guest

        yield start


def resident_bytes(pid: int) -> int:
    return int(status_of(pid)["VmRSS"].split()[0]) * 1024


def pour(fd: int, count: int, byte: bytes = b"x") -> None:
    """Write `count` bytes to `fd` and close it."""
    piece = byte * (1 << 16)
    with contextlib.suppress(BrokenPipeError), open(fd, "wb", buffering=0) as pipe:
        while count > 0:
            count -= pipe.write(piece[:count]) or 0


# Jobs


def test_job_across_the_link(bridges: Bridges) -> None:
    """READY, START with HOLD, GO and EXITED work as with an agent on this host; the bridge ends with the job's code."""
    bridge = bridges()
    assert bridge.ready() == 1  # PID 1 of a namespace of its own
    bridge.start("sh", "-c", "exit 7", flags=HOLD)
    bridge.prepared()
    bridge.send(encode_go())
    assert bridge.exited() == (7, 0, 0)
    assert bridge.ended()
    assert bridge.wait() == 7


def test_streams_are_the_jobs_own(bridges: Bridges) -> None:
    """stdin, its end, stdout and stderr pass, each byte in its own stream."""
    bridge = bridges()
    bridge.ready()
    (in_read, in_write), (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe(), os.pipe()
    bridge.start("sh", "-c", "cat; echo wrong >&2; exit 3", stdio=(in_read, out_write, err_write))
    for fd in (in_read, out_write, err_write):
        os.close(fd)
    bridge.prepared()
    pour(in_write, 5, b"q")
    with open(out_read, "rb") as out, open(err_read, "rb") as err:
        assert out.read() == b"qqqqq"
        assert err.read() == b"wrong\n"
    assert bridge.exited()[0] == 3
    assert bridge.wait() == 3


def test_output_before_the_end_is_there_at_the_end(bridges: Bridges) -> None:
    """When EXITED comes all that the job has written is in the host's pipe already, as it is without a link."""
    bridge = bridges()
    bridge.ready()
    reading, writing = os.pipe()
    with open(os.devnull, "r+b") as null:
        bridge.start("sh", "-c", "echo last words", stdio=(null.fileno(), writing, null.fileno()))
    bridge.prepared()
    assert bridge.exited()[0] == 0
    os.set_blocking(reading, False)
    assert os.read(reading, 100) == b"last words\n"
    os.close(reading)
    os.close(writing)


def test_a_gigabyte_there_and_back(bridges: Bridges) -> None:
    """1 GB passes byte for byte through stdin and stdout at once, and neither end grows."""
    size = 1 << 30
    bridge = bridges()
    bridge.ready()
    (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
    bridge.start("cat", stdio=(in_read, out_write, out_write))
    os.close(in_read)
    os.close(out_write)
    bridge.prepared()
    piece = os.urandom(1 << 20)
    writer = threading.Thread(target=feed, args=(in_write, piece, size // len(piece)))
    writer.start()
    processes = [bridge.host_pid(), *children(bridge.host_pid())]
    twice, most = memoryview(piece * 2), [0, 0]
    count = 0
    with open(out_read, "rb", buffering=0) as out:
        while data := out.read(1 << 20):
            at = count % len(piece)
            assert data == twice[at : at + len(data)], f"another byte after {count}"
            if (count + len(data)) >> 26 != count >> 26 and count < size - (1 << 26):
                most = [max(old, resident_bytes(pid)) for old, pid in zip(most, processes, strict=True)]
            count += len(data)
    writer.join()
    assert count == size
    assert max(most) < 2 << 20, most
    assert bridge.exited() == (0, 0, 0)
    assert bridge.wait() == 0


def feed(fd: int, piece: bytes, times: int) -> None:
    with open(fd, "wb", buffering=0) as pipe:
        for _ in range(times):
            view = memoryview(piece)
            while view:
                view = view[pipe.write(view) or 0 :]


def test_a_slow_reader_stops_the_job_and_loses_nothing(bridges: Bridges) -> None:
    """Nobody reads: the job waits, with no more than pipes and one window on the way; all of it arrives in the end."""
    size = 4 << 20
    bridge = bridges()
    bridge.ready()
    (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe()
    script = f"head -c {size} /dev/zero; echo done >&2"
    with open(os.devnull, "rb") as null:
        bridge.start("sh", "-c", script, stdio=(null.fileno(), out_write, err_write))
    os.close(out_write)
    os.close(err_write)
    bridge.prepared()
    assert not select.select([err_read], [], [], 0.5)[0]
    with open(out_read, "rb") as out, open(err_read, "rb") as err:
        assert out.read() == bytes(size)
        assert err.read() == b"done\n"
    assert bridge.exited()[0] == 0


def test_the_end_is_told_though_nobody_reads(bridges: Bridges) -> None:
    """EXITED does not wait for a reader of what is left; what is left still comes, with the machine up as long."""
    size = 150_000  # two pipes and a window hold it: the job ends
    bridge = bridges()
    bridge.ready()
    reading, writing = os.pipe()
    with open(os.devnull, "r+b") as null:
        stdio = (null.fileno(), writing, null.fileno())
        bridge.start("head", "-c", str(size), "/dev/zero", stdio=stdio)
    os.close(writing)
    bridge.prepared()
    assert bridge.exited()[0] == 0
    assert bridge.lives(3)
    with open(reading, "rb") as out:
        assert out.read() == bytes(size)
    assert bridge.wait() == 0


def test_a_reader_that_goes_gives_sigpipe(bridges: Bridges) -> None:
    """The job gets SIGPIPE when the host closes the pipe that it writes to, also while it is blocked."""
    bridge = bridges()
    bridge.ready()
    reading, writing = os.pipe()
    with open(os.devnull, "r+b") as null:
        bridge.start("cat", "/dev/zero", stdio=(null.fileno(), writing, null.fileno()))
    os.close(writing)
    bridge.prepared()
    time.sleep(0.3)
    os.close(reading)
    assert bridge.exited() == (128 + signal.SIGPIPE, signal.SIGPIPE, 0)


def test_a_job_that_closes_its_input_gives_epipe(bridges: Bridges) -> None:
    """Who writes to a job that does not read any more is told, as with a pipe."""
    bridge = bridges()
    bridge.ready()
    in_read, in_write = os.pipe()
    with open(os.devnull, "r+b") as null:
        bridge.start("sh", "-c", "exec 0<&-; sleep 30", stdio=(in_read, null.fileno(), null.fileno()))
    os.close(in_read)
    bridge.prepared()

    def refused() -> bool:
        try:
            os.write(in_write, b"x")
        except BrokenPipeError:
            return True
        return False

    eventually(refused)
    os.close(in_write)


def test_nothing_is_read_before_go(bridges: Bridges) -> None:
    """A job that is held takes nothing of an input that it may have to share with others."""
    bridge = bridges()
    bridge.ready()
    in_read, in_write = os.pipe()
    os.write(in_write, b"mine")
    with open(os.devnull, "r+b") as null:
        bridge.start("cat", flags=HOLD, stdio=(in_read, null.fileno(), null.fileno()))
    bridge.prepared()
    time.sleep(0.1)
    assert os.read(in_read, 100) == b"mine"
    os.close(in_read)
    os.close(in_write)


def test_input_that_others_read_too_blocks_nobody(bridges: Bridges) -> None:
    """An input of which somebody else takes every byte first never makes the bridge wait in a read."""
    bridge = bridges()
    bridge.ready()
    in_read, in_write = os.pipe()
    stop = threading.Event()

    def thief() -> None:
        while not stop.is_set():
            if select.select([in_read], [], [], 0.1)[0]:
                with contextlib.suppress(BlockingIOError):
                    os.read(in_read, 1)

    os.set_blocking(in_read, True)
    with open(os.devnull, "r+b") as null:
        bridge.start("sleep", "30", stdio=(in_read, null.fileno(), null.fileno()))
    bridge.prepared()
    threads = [threading.Thread(target=thief)]
    threads[0].start()
    for _ in range(2000):
        os.write(in_write, b"x")
    bridge.send(encode_signal(signal.SIGTERM))
    assert bridge.exited()[1] == signal.SIGTERM
    assert os.get_blocking(in_read)
    stop.set()
    os.close(in_write)
    threads[0].join()
    os.close(in_read)


def test_a_file_as_input(bridges: Bridges, tmp_path: Path) -> None:
    """A regular file, which nobody can poll for, is read to its end."""
    bridge = bridges()
    bridge.ready()
    data = os.urandom(300_000)
    (tmp_path / "input").write_bytes(data)
    reading, writing = os.pipe()
    with open(tmp_path / "input", "rb") as file, open(os.devnull, "r+b") as null:
        bridge.start("cat", stdio=(file.fileno(), writing, null.fileno()))
    os.close(writing)
    with open(reading, "rb") as out:
        assert out.read() == data
    bridge.prepared()
    assert bridge.exited()[0] == 0


def test_large_start_and_report(bridges: Bridges) -> None:
    """A START of some MB arrives whole, as does the answer to a REPORT."""
    bridge = bridges()
    bridge.ready()
    env = [b"PATH=/usr/bin:/bin", *(b"V%d=" % i + b"x" * 100_000 for i in range(18))]
    reading, writing = os.pipe()
    with open(os.devnull, "r+b") as null:
        stdio = (null.fileno(), writing, null.fileno())
        bridge.start("sh", "-c", "env | wc -c", flags=HOLD, env=env, stdio=stdio)
    os.close(writing)
    bridge.prepared()
    bridge.send(encode_report())
    texts = protocol.decode_reported(bridge.expect(REPORTED)[0])
    assert "Linux version" in texts["version"]
    assert "/proc" in texts["mountinfo"]
    bridge.send(encode_go())
    with open(reading, "rb") as out:
        assert int(out.read()) > 1_800_000
    assert bridge.exited()[0] == 0


def test_command_that_is_missing(bridges: Bridges) -> None:
    """FAILED passes, and is what the bridge ends with."""
    bridge = bridges()
    bridge.ready()
    bridge.start("/none", flags=HOLD)
    bridge.prepared()
    bridge.send(encode_go())
    assert bridge.failed() == (protocol.STAGE_EXEC, 2)
    assert bridge.wait() == 127


def test_largest_start(bridges: Bridges) -> None:
    """A START of all but 4 MiB arrives, and has the kernel's answer: no process can have that much."""
    bridge = bridges()
    bridge.ready()
    bridge.start("true", env=[b"V%d=" % i + b"x" * 100_000 for i in range(41)])
    bridge.prepared()
    assert bridge.failed() == (protocol.STAGE_EXEC, 7)
    assert bridge.wait() == 126


# Terminals


def test_terminal(bridges: Bridges) -> None:
    """What is typed and shown passes both ways; RESIZE works; the connection ends before EXITED comes."""
    bridge = bridges()
    bridge.ready()
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    script = "stty size; read line; stty size; echo got $line; exit 4"
    flags = TTY | RELAY | HOLD
    with theirs:
        bridge.start("sh", "-c", script, flags=flags, stdio=(theirs.fileno(),), cols=80, rows=24)
    bridge.prepared()
    bridge.send(encode_go())
    with ours:
        shown = receive_until(ours, b"24 80\r\n")
        bridge.send(encode_resize(132, 43))
        time.sleep(0.1)
        ours.sendall(b"hello\n")
        shown += receive_until(ours, b"")
    assert b"43 132\r\n" in shown
    assert shown.endswith(b"got hello\r\n")
    assert bridge.exited()[0] == 4
    assert bridge.wait() == 4


def receive_until(sock: socket.socket, text: bytes) -> bytes:
    """Read until `text` is there, or to the end if there is none."""
    data = b""
    while not (text and text in data):
        more = sock.recv(1 << 16)
        if not more:
            break
        data += more
    return data


def test_terminal_of_whom_the_host_lets_go(bridges: Bridges) -> None:
    """A terminal whose host end is closed is hung up, though its job does not read what was typed."""
    bridge = bridges()
    bridge.ready()
    ours, theirs = socket.socketpair()
    with theirs:
        bridge.start("sleep", "30", flags=TTY | RELAY, stdio=(theirs.fileno(),))
    bridge.prepared()
    with ours:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for _ in range(1000):
                ours.send(b"x" * 4096)
        time.sleep(0.2)
    assert bridge.exited()[1] == signal.SIGHUP


def test_flood_of_a_terminal(bridges: Bridges) -> None:
    """All that a terminal shows arrives, to the last byte before its job's end."""
    bridge = bridges()
    bridge.ready()
    ours, theirs = socket.socketpair()
    ours.settimeout(WAIT_S)
    with theirs:
        bridge.start("seq", "100000", flags=TTY | RELAY, stdio=(theirs.fileno(),))
    bridge.prepared()
    with ours:
        shown = receive_until(ours, b"")
    assert shown == b"".join(b"%d\r\n" % i for i in range(1, 100_001))
    assert bridge.exited()[0] == 0


# Connections


def test_exec_while_the_job_runs(bridges: Bridges) -> None:
    """Further connections run jobs of their own, in order and at once; a number is used again and again."""
    bridge = bridges()
    bridge.ready()
    bridge.start("sleep", "60")
    bridge.prepared()
    for turn in range(80):
        frames = bridge.exec()
        assert frames.output("echo", str(turn)) == b"%d\n" % turn
        frames.prepared()
        assert frames.exited()[0] == 0
        assert frames.ended()
    many = [bridge.exec() for _ in range(32)]
    waiting = bridge.connect()
    assert not select.select([waiting.sock], [], [], 0.2)[0]
    for number, frames in enumerate(many):
        frames.start("sh", "-c", f"exit {number}")
        frames.prepared()
        assert frames.exited()[0] == number
    waiting.ready()
    bridge.send(encode_shutdown())
    assert bridge.exited()[1] == signal.SIGKILL
    assert waiting.ended()
    assert bridge.wait() == 137


def test_nothing_is_accepted_beside_a_held_job(bridges: Bridges) -> None:
    """Until the main job is let go no connection is accepted; then it is."""
    bridge = bridges()
    bridge.ready()
    early = bridge.connect()
    assert not select.select([early.sock], [], [], 0.2)[0]
    bridge.start("sleep", "60", flags=HOLD)
    bridge.prepared()
    assert not select.select([early.sock], [], [], 0.2)[0]
    bridge.send(encode_go())
    early.ready()


def test_exec_whose_client_goes_is_killed(bridges: Bridges) -> None:
    """The job of a connection dies with it, and so do its processes; the main job does not notice."""
    bridge = bridges()
    bridge.ready()
    bridge.start("sleep", "60")
    bridge.prepared()
    frames = bridge.exec()
    reading, writing = os.pipe()
    with open(os.devnull, "r+b") as null:
        frames.start("sh", "-c", "echo up; sleep 60", stdio=(null.fileno(), writing, null.fileno()))
    os.close(writing)
    frames.prepared()
    with open(reading, "rb") as out:
        assert out.readline() == b"up\n"
        frames.connection.close()
        assert out.read() == b""
    assert bridge.exec().output("echo", "on") == b"on\n"


def test_signal_reaches_the_job(bridges: Bridges) -> None:
    """SIGNAL passes: of the connection's own job, and of the main job from a connection without one."""
    bridge = bridges()
    bridge.ready()
    bridge.start("sleep", "60")
    bridge.prepared()
    bridge.exec().send(encode_signal(signal.SIGUSR1))
    assert bridge.exited() == (128 + signal.SIGUSR1, signal.SIGUSR1, 0)


def test_launcher_goes(bridges: Bridges) -> None:
    """With the launcher's connection the whole machine ends, held or running."""
    for flags in (0, HOLD):
        bridge = bridges()
        bridge.ready()
        bridge.start("sleep", "60", flags=flags)
        bridge.prepared()
        bridge.connection.close()
        bridge.wait()


def test_launcher_goes_before_the_guest_is_up(bridges: Bridges) -> None:
    """A VMM that never says HELLO is waited for as long as the launcher does, and no longer."""
    bridge = bridges(["/bin/sleep", "1000"])
    assert bridge.lives(0.5)
    bridge.connection.close()
    assert bridge.wait() == 0


# Logs


def test_detached_job_outlives_its_launcher(bridges: Bridges, tmp_path: Path) -> None:
    """A detached job that was let go runs on without the launcher, and its log has all that it wrote and its end."""
    bridge = bridges(log_bytes=1 << 20)
    bridge.ready()
    log = tmp_path / "log"
    with open(log, "ab") as file:
        stdio = (file.fileno(),)
        bridge.start("sh", "-c", "echo one; sleep 1; echo two; exit 9", flags=DETACH | HOLD, stdio=stdio)
    bridge.prepared()
    bridge.send(encode_go())
    bridge.connection.close()
    assert bridge.wait() == 9
    records = parsed(log.read_bytes())
    assert b"".join(data for stream, data in records if stream != END) == b"one\ntwo\n"
    assert protocol.decode_end(records[-1][1])[0] == 9


def test_log_is_bounded_by_the_host(bridges: Bridges, tmp_path: Path) -> None:
    """Whatever the guest says a log has: no more than LOGBYTES of it are written."""
    bridge = bridges(log_bytes=5000)
    bridge.ready()
    log = tmp_path / "log"
    with open(log, "ab") as file:
        bridge.start("head", "-c", "1000000", "/dev/zero", flags=DETACH, stdio=(file.fileno(),))
    bridge.prepared()
    assert bridge.exited()[0] == 0
    assert bridge.wait() == 0
    assert log.stat().st_size == 5000


@pytest.mark.parametrize("case", ["no log", "pipe", "bare terminal", "socket"])
def test_start_that_cannot_cross(bridges: Bridges, tmp_path: Path, case: str) -> None:
    """A log where none was announced or that is no file, a terminal without a relay, a relay that is no socket."""
    bridge = bridges(log_bytes=0 if case == "no log" else 1000)
    bridge.ready()
    reading, writing = os.pipe()
    flags = {"bare terminal": TTY, "socket": TTY | RELAY}.get(case, DETACH)
    with open(tmp_path / "log", "ab") as file:
        stdio = {"no log": (file.fileno(),), "bare terminal": ()}.get(case, (writing,))
        bridge.start("true", flags=flags, stdio=stdio)
    os.close(reading)
    os.close(writing)
    assert bridge.ended()
    assert bridge.wait() == 125


def test_out_of_memory_is_told(bridges: Bridges, tmp_path: Path) -> None:
    """EXITED says so when the kernel has killed in the job's cgroup since START."""
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 4\noom_kill 4\n")
    bridge = bridges([binary(), "--back", "@LINK@", str(events)])
    bridge.ready()
    bridge.start("sh", "-c", f"echo oom_kill 5 > {events}; kill -9 $$", flags=HOLD)
    bridge.prepared()
    bridge.send(encode_go())
    assert bridge.exited() == (137, 9, OUT_OF_MEMORY)


# What the VMM says


def test_words_are_kept_and_bounded(bridges: Bridges) -> None:
    """Of what VMM, console and bridge say the beginning and the end are kept, and more makes nobody wait."""
    program = "import os, sys; os.write(2, b'oops'); os.write(int(sys.argv[1]), b'x' * 1000000 + b'panic'); sys.exit(3)"
    bridge = bridges([sys.executable, "-ISc", program, "@CONSOLE@"])
    assert bridge.ended()
    assert bridge.wait() == 125
    words = bridge.words.read_bytes()
    end = b"panicthe VMM exited with status 3\n"
    assert words[:FIRST_WORDS_BYTES] == b"oops".ljust(FIRST_WORDS_BYTES, b"x")
    assert words[FIRST_WORDS_BYTES:] == b"\n[some is left out here]\n" + end.rjust(LAST_WORDS_BYTES, b"x")


def test_words_that_just_fit(bridges: Bridges) -> None:
    """Nothing is missing, and nothing is said to be, up to 48 KiB."""
    end = b"the VMM exited with status 3\n"
    size = FIRST_WORDS_BYTES + LAST_WORDS_BYTES - len(end)
    program = f"import os, sys; os.write(2, b'x' * {size}); sys.exit(3)"
    bridge = bridges([sys.executable, "-ISc", program])
    assert bridge.ended()
    bridge.wait()
    assert bridge.words.read_bytes() == b"x" * size + end


# The bridge's own clock


@pytest.mark.parametrize("detached", [True, False])
def test_a_guest_that_keeps_no_time(detached: bool, hostiles: Hostiles, tmp_path: Path) -> None:
    """Two seconds after the main job's own deadline the machine ends, whatever the guest says; the words say why."""
    bridge, guest = hostiles(log_bytes=1000)
    with open(tmp_path / "log", "wb") as log:
        flags = HOLD | (DETACH if detached else 0)
        bridge.start("job", flags=flags, deadline_ms=300, stdio=(log.fileno(),) if detached else None)
        guest.order(protocol.START)
        guest.prepared()
        bridge.expect(PREPARED)
        assert bridge.lives(2.5), "a clock that runs before the job does"
        began = time.monotonic()
        bridge.connection.send(encode_go())
        guest.order(protocol.GO)
        bridge.wait(5)
        assert 2.2 < time.monotonic() - began < 4
        assert bridge.words.read_bytes().endswith(b"\ndeadline\n")


def test_vmm_that_cannot_be_started(bridges: Bridges) -> None:
    """The launcher sees the end of its connection, and why in the words."""
    bridge = bridges(["/none"])
    assert bridge.ended()
    assert bridge.wait() == 125
    assert "cannot be executed" in bridge.words.read_text()


def test_what_the_vmm_has(bridges: Bridges) -> None:
    """The VMM has a null input, its pipe, the link, what it was given, and nothing else; no capability either."""
    program = """
import os, sys
for fd in sorted(int(fd) for fd in os.listdir("/proc/self/fd")):
    try:
        print(fd, os.readlink(f"/proc/self/fd/{fd}").split(":")[0], flush=True)
    except OSError:
        pass
for line in open("/proc/self/status"):
    if line.startswith(("CapEff", "CapBnd", "NoNewPrivs", "SigBlk", "SigIgn")):
        print(line.strip().replace("\t", " "), flush=True)
print(sorted(os.environ), sys.argv[1:], flush=True)
"""
    with open("/proc/version", "rb") as extra:
        words = ["a@LINK@b@CONSOLE@", "@", "@LINK", ""]
        bridge = bridges([sys.executable, "-ISc", program, *words], extra=extra.fileno())
    assert bridge.wait() == 125
    lines = bridge.words.read_text().splitlines()
    descriptors = dict(line.split(" ", 1) for line in lines if line[0].isdigit())
    assert descriptors.pop("0") == "/dev/null"
    assert descriptors.pop("1") == descriptors.pop("2") == "pipe"
    assert descriptors.pop("8") == "/proc/version"
    link = next(fd for fd, kind in descriptors.items() if kind == "socket")
    console = next(fd for fd, kind in descriptors.items() if kind == "pipe")
    assert set(descriptors) == {link, console}
    assert f"['a{link}b{console}', '@', '@LINK', '']" in lines[-1]
    assert "['LC_CTYPE', 'PATH'] " in lines[-1] or "['PATH'] " in lines[-1]
    status = dict(line.split(": ") for line in lines if line[0] in "CNS")
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert int(status["SigBlk"], 16) == 0


def test_vmm_that_dies(bridges: Bridges, hostiles: Hostiles) -> None:
    """A VMM killed under a running job ends everything, and the launcher sees no EXITED."""
    bridge = bridges()
    bridge.ready()
    bridge.start("sleep", "60")
    bridge.prepared()
    os.kill(children(bridge.host_pid())[0], signal.SIGKILL)
    assert bridge.ended()
    assert bridge.wait() == 125


def test_link_that_closes_with_the_vmm_alive(hostiles: Hostiles) -> None:
    """A VMM that drops the link is given two seconds, and killed."""
    bridge, guest = hostiles()
    guest.sock.close()
    assert bridge.wait() == 125


def test_guest_that_does_not_switch_off(hostiles: Hostiles) -> None:
    """After POWEROFF the VMM has two seconds."""
    bridge, guest = hostiles()
    bridge.start("true")
    guest.order(protocol.START)
    guest.prepared()
    guest.exited(5)
    for stream in (1, 2):
        guest.send(END_OF, channel=0, stream=stream)
    bridge.prepared()
    assert bridge.exited()[0] == 5
    while (frame := guest.recv()) and frame[0] != POWEROFF:
        assert frame[0] in (STOP, END_OF, DATA)
    assert bridge.lives(1)
    assert bridge.wait() == 5


def over_but_writing(bridge: Bridge, guest: Guest) -> list[int]:
    """A guest that has said that its main job is over, and keeps the streams."""
    descriptors = [*with_job(bridge, guest)]
    guest.exited(0)
    assert bridge.exited()[0] == 0
    return descriptors


def test_guest_that_drips_after_the_end(hostiles: Hostiles) -> None:
    """With the main job over the guest has some seconds for the rest, whatever it sends: no launcher's clock runs."""
    bridge, guest = hostiles()
    descriptors = over_but_writing(bridge, guest)
    began = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while time.monotonic() - began < 20:
            guest.send(DATA, b"x", channel=0, stream=1)
            time.sleep(0.1)
    assert 4 < time.monotonic() - began < 15
    assert bridge.wait() == 0
    for fd in descriptors:
        os.close(fd)


def test_guest_that_floods_after_the_end(hostiles: Hostiles) -> None:
    """After the main job's end no more comes than its pipes could hold."""
    bridge, guest = hostiles()
    descriptors = over_but_writing(bridge, guest)
    taken = 0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while taken < 16 << 20:
            guest.send(DATA, bytes(16384), channel=0, stream=1)
            taken += len(os.read(descriptors[1], 1 << 16))
    assert taken < 4 << 20
    bridge.wait()
    assert "broken the protocol" in bridge.words.read_text()
    for fd in descriptors:
        os.close(fd)


def test_guest_that_does_not_obey_shutdown(hostiles: Hostiles) -> None:
    """SHUTDOWN ends the machine in some seconds, whatever the guest does."""
    bridge, guest = hostiles()
    bridge.start("true")
    bridge.send(encode_shutdown())
    guest.order(protocol.START)
    guest.order(protocol.SHUTDOWN)
    bridge.wait()
    assert guest.ended()


# Setting up


def test_setup_reaches_the_guest(hostiles: Hostiles) -> None:
    """SETUP has the host's clock, entropy that differs each time, and the text as it is; HELLO is in the words."""
    entropies = set()
    for _ in range(2):
        bridge, guest = hostiles(boot=False)
        guest.hello()
        payload = guest.expect(SETUP)
        assert abs(int.from_bytes(payload[:8], "little") / 1e9 - time.time()) < 60
        entropies.add(payload[8:72])
        assert payload[72:] == SETUP_TEXT
        guest.send(SETUP_DONE)
        guest.ready()
        bridge.ready()
        assert bridge.words.read_text() == "guest kernel 6.1.0-test, booted in 1234 ms\n"
    assert len(entropies) == 2
    assert all(len(set(entropy)) > 32 for entropy in entropies)


def test_restored_guest(hostiles: Hostiles) -> None:
    """A guest that has said HELLO before it was saved is sent SETUP at once."""
    bridge, guest = hostiles(boot=False, wait=0)
    guest.expect(SETUP)
    guest.send(SETUP_DONE)
    guest.ready()
    bridge.ready()


def test_setup_that_fails(hostiles: Hostiles) -> None:
    """SETUP_FAILED ends everything; what the guest says of it is in the words, made harmless."""
    bridge, guest = hostiles(boot=False)
    guest.hello()
    guest.expect(SETUP)
    guest.send(SETUP_FAILED, struct.pack("<I", 19) + b"mount \x1b[31m/dev/vda\0")
    guest.sock.close()
    assert bridge.ended()
    assert bridge.wait() == 125
    assert "cannot be set up: mount ?[31m/dev/vda: errno 19\n" in bridge.words.read_text()


def test_setup_text_that_is_wrong(bridges: Bridges, tmp_path: Path) -> None:
    """A setup file that is missing, too large, or does not end an item: nothing is started."""
    for number, data in enumerate((b"hostname=x", b"", b"x" * (1 << 20) + b"\0")):
        place = tmp_path / f"wrong-{number}"
        place.mkdir()
        (place / "setup").write_bytes(data)
        bridge = Bridge(place, ["/bin/sleep", "1000"])
        try:
            assert bridge.wait() == 125
        finally:
            bridge.close()


@pytest.mark.parametrize("argument", [{"wait": 2}, {"wait": ""}, {"log_bytes": "-1"}, {"log_bytes": "1k"}])
def test_arguments_that_are_none(bridges: Bridges, argument: dict[str, str]) -> None:
    """What is no number, or neither 0 nor 1, starts nothing."""
    assert bridges(["/bin/sleep", "1000"], **argument).wait() == 125


# A hostile guest


def header(length: int, kind: int, stream: int, channel: int) -> bytes:
    return struct.pack("<IBBH", length, kind, stream, channel)


def answer(kind: int, payload: bytes, flags: int = 0, reserved: int = 0) -> bytes:
    frame = struct.pack("<IBBH", len(payload), kind, flags, reserved) + payload
    return header(len(frame), CONTROL, 0, 0) + frame


EIGHT = bytes(8)
WRONG = {
    "unknown type": header(0, 99, 0, 0),
    "file": header(0, 32, 0, MACHINE),
    "second hello": header(10, HELLO, 0, MACHINE) + struct.pack("<II", 1, 0) + b"\0\0",
    "second setup_done": header(0, SETUP_DONE, 0, MACHINE),
    "late setup_failed": header(5, SETUP_FAILED, 0, MACHINE) + bytes(5),
    "setup": header(72, SETUP, 0, MACHINE) + bytes(72),
    "open": header(0, OPEN, 0, 1),
    "poweroff": header(0, POWEROFF, 0, MACHINE),
    "channel 33": header(0, CLOSE, 0, 33),
    "close of a free channel": header(0, CLOSE, 0, 5),
    "close with a payload": header(1, CLOSE, 0, 0) + b"x",
    "close with a stream": header(0, CLOSE, 1, 0),
    "data of no job": header(1, DATA, 1, 0) + b"x",
    "data of stdin": header(1, DATA, 0, 0) + b"x",
    "stream 3": header(1, DATA, 3, 0) + b"x",
    "no data": header(0, DATA, 1, 0),
    "data too long": header(32769, DATA, 1, 0),
    "credit of stdout": header(4, CREDIT, 1, 0) + b"\1\0\0\0",
    "credit without a job": header(4, CREDIT, 0, 0) + b"\1\0\0\0",
    "stop without a job": header(0, STOP, 0, 0),
    "end without a job": header(0, END_OF, 1, 0),
    "huge": header(0xFFFFFFFF, CONTROL, 0, 0),
    "control too long": header(8 + (1 << 18) + 1, CONTROL, 0, 0),
    "short control": header(7, CONTROL, 0, 0) + bytes(7),
    "control of a free channel": header(16, CONTROL, 0, 9) + protocol.encode(READY, 0, EIGHT),
    "second ready": answer(READY, EIGHT),
    "prepared without a job": answer(PREPARED, EIGHT),
    "exited without a job": answer(EXITED, bytes(12)),
    "reported unasked": answer(REPORTED, b""),
    "start": answer(protocol.START, bytes(28)),
    "answer with a flag": answer(READY, EIGHT, flags=1),
    "answer with a reserved byte": answer(READY, EIGHT, reserved=1),
    "answer of another length": answer(READY, bytes(9)),
    "answer whose lengths differ": header(17, CONTROL, 0, 0) + protocol.encode(READY, 0, EIGHT) + b"x",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_byte_is_the_end(hostiles: Hostiles, name: str) -> None:
    """Whatever the protocol does not have ends the machine at once: nothing is skipped, nothing is passed on."""
    bridge, guest = hostiles()
    guest.raw(WRONG[name])
    assert bridge.ended()
    assert bridge.wait() == 125
    assert "broken the protocol" in bridge.words.read_text()


def with_job(bridge: Bridge, guest: Guest, flags: int = 0) -> tuple[int, int, int]:
    """Start a job that the guest knows of; returns the host's ends of its stdin, stdout and stderr."""
    (in_read, in_write), (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe(), os.pipe()
    bridge.start("true", stdio=(in_read, out_write, err_write), flags=flags)
    for fd in (in_read, out_write, err_write):
        os.close(fd)
    guest.order(protocol.START)
    guest.prepared()
    bridge.prepared()
    return in_write, out_read, err_read


LATER = {
    "second prepared": [answer(PREPARED, EIGHT)],
    "exited twice": [answer(EXITED, bytes(12)), answer(EXITED, bytes(12))],
    "failed after exited": [answer(EXITED, bytes(12)), answer(protocol.FAILED, EIGHT)],
    "prepared after exited": [answer(EXITED, bytes(12)), answer(PREPARED, EIGHT)],
    "reported after prepared": [answer(REPORTED, b"")],
    "control after close": [header(0, CLOSE, 0, 0), answer(EXITED, bytes(12))],
    "close twice": [header(0, CLOSE, 0, 0), header(0, CLOSE, 0, 0)],
    "end twice": [header(0, END_OF, 1, 0), header(0, END_OF, 1, 0)],
    "data after end": [header(0, END_OF, 1, 0), header(1, DATA, 1, 0), b"x"],
    "stop twice": [header(0, STOP, 0, 0), header(0, STOP, 0, 0)],
    "credit after stop": [header(0, STOP, 0, 0), header(4, CREDIT, 0, 0), b"\1\0\0\0"],
    "credit that is not due": [header(4, CREDIT, 0, 0), b"\1\0\0\0"],
    "no credit": [header(4, CREDIT, 0, 0), bytes(4)],
    "credit that wraps": [header(4, CREDIT, 0, 0), b"\xff\xff\xff\xff"],
    "data beyond credit": [header(32768, DATA, 1, 0), bytes(32768)] * 7,
}


@pytest.mark.parametrize("name", LATER)
def test_wrong_order_is_the_end(hostiles: Hostiles, name: str) -> None:
    """What may come once comes once, and nobody sends beyond the credit it has."""
    bridge, guest = hostiles()
    descriptors = with_job(bridge, guest)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for piece in LATER[name]:
            guest.raw(piece)
    bridge.wait()
    assert "broken the protocol" in bridge.words.read_text()
    for fd in descriptors:
        os.close(fd)


def test_flood_does_not_make_the_bridge_grow(hostiles: Hostiles) -> None:
    """A guest that uses all its credit on all streams of all channels, with no reader, costs no more than that."""
    bridge, guest = hostiles()
    descriptors = [*with_job(bridge, guest)]
    before = resident_bytes(bridge.host_pid())
    for channel in range(1, 33):
        frames = bridge.connect()
        guest.expect(OPEN, channel)
        guest.ready(channel)
        frames.ready()
        in_read, in_write = os.pipe()
        out_read, out_write = os.pipe()
        frames.start("true", stdio=(in_read, out_write, out_write))
        guest.order(protocol.START, channel)
        os.close(in_read)
        os.close(out_write)
        descriptors += [in_write, out_read]
    granted = dict.fromkeys([(channel, stream) for channel in range(33) for stream in (1, 2)], WINDOW_BYTES)
    sent = 0
    guest.sock.settimeout(0.5)
    while any(granted.values()):
        for (channel, stream), credit in granted.items():
            while granted[channel, stream] > 0:
                piece = min(32768, granted[channel, stream])
                guest.send(DATA, bytes(piece), channel=channel, stream=stream)
                granted[channel, stream] -= piece
                sent += piece
            assert credit <= WINDOW_BYTES
        with contextlib.suppress(TimeoutError):
            while frame := guest.recv():
                assert frame[0] == CREDIT
                granted[frame[2], frame[1]] += int.from_bytes(frame[3], "little")
    assert sent < 66 * 3 * WINDOW_BYTES
    assert bridge.lives(0.2)
    assert resident_bytes(bridge.host_pid()) - before < 66 * WINDOW_BYTES + (1 << 20)
    used = cpu_ticks(bridge.host_pid())
    time.sleep(1)
    assert cpu_ticks(bridge.host_pid()) - used < 10
    for fd in descriptors:
        os.close(fd)


def test_guest_that_does_not_read(hostiles: Hostiles) -> None:
    """It takes data without end and never reads: the bridge neither grows nor spins, and the launcher can still go."""
    bridge, guest = hostiles()
    in_write, out_read, err_read = with_job(bridge, guest)
    os.set_blocking(in_write, False)
    before = resident_bytes(bridge.host_pid())
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(in_write, bytes(65536))
            time.sleep(0.01)
    # Every RESIZE waits for the guest to read, and what is in the socket then for the bridge.
    bridge.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(100_000):
            bridge.sock.send(encode_signal(10))
    time.sleep(0.3)
    assert resident_bytes(bridge.host_pid()) - before < 1 << 20
    used = cpu_ticks(bridge.host_pid())
    time.sleep(1)
    assert cpu_ticks(bridge.host_pid()) - used < 10
    bridge.connection.close()
    bridge.wait()
    for fd in (in_write, out_read, err_read):
        os.close(fd)


def test_guest_that_predicts_credit(hostiles: Hostiles) -> None:
    """A guest that never reads its credit, but knows how much it must have, gets no more once nothing can be sent."""
    bridge, guest = hostiles()
    descriptors = with_job(bridge, guest)
    out_read = descriptors[1]
    before = resident_bytes(bridge.host_pid())
    most = sent = taken = 0
    piece = bytes(WINDOW_BYTES // 4)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while sent < 256 << 20:
            guest.send(DATA, piece, channel=0, stream=1)
            sent += len(piece)
            # What has come out here was written, so all of it but a last quarter of a window is granted again.
            while taken + 2 * len(piece) < sent and (data := os.read(out_read, 1 << 16)):
                taken += len(data)
            if sent % (8 << 20) == 0:
                most = max(most, resident_bytes(bridge.host_pid()))
            if taken + 2 * len(piece) < sent:
                break
    assert 16 << 20 < sent < 256 << 20
    assert most - before < 1 << 20
    assert bridge.wait() == 125
    assert "broken the protocol" in bridge.words.read_text()
    for fd in descriptors:
        os.close(fd)


def test_channel_is_used_again_when_all_of_it_is_over(hostiles: Hostiles) -> None:
    """A number is free only after both CLOSE and both ends of each stream."""
    bridge, guest = hostiles()
    descriptors = with_job(bridge, guest)
    frames = bridge.connect()
    guest.expect(OPEN, 1)
    guest.ready(1)
    frames.ready()
    frames.connection.close()
    guest.expect(CLOSE, 1)
    second = bridge.connect()
    guest.expect(OPEN, 2)
    guest.send(CLOSE, channel=1)
    guest.ready(2)
    second.ready()
    third = bridge.connect()
    guest.expect(OPEN, 1)
    guest.ready(1)
    third.ready()
    for fd in descriptors:
        os.close(fd)


def test_report_is_passed_once(hostiles: Hostiles) -> None:
    """A held job's REPORTED of the largest size reaches the host; one that nobody asked for is the end."""
    bridge, guest = hostiles()
    descriptors = with_job(bridge, guest, HOLD)
    bridge.send(encode_report())
    guest.order(protocol.REPORT)
    text = b"version\0" + b"x" * ((1 << 18) - 9) + b"\0"
    sender = threading.Thread(target=guest.control, args=(REPORTED, text))
    sender.start()
    assert bridge.expect(REPORTED)[0] == text
    sender.join()
    guest.control(REPORTED, b"")
    assert bridge.wait() == 125
    for fd in descriptors:
        os.close(fd)


def test_job_is_killed_with_output_pending(bridges: Bridges) -> None:
    """What a killed job had written before is passed on, to the last byte that its pipe has."""
    bridge = bridges()
    bridge.ready()
    reading, writing = os.pipe()
    with open(os.devnull, "r+b") as null:
        bridge.start("sh", "-c", "cat /dev/zero", stdio=(null.fileno(), writing, null.fileno()))
    os.close(writing)
    bridge.prepared()
    time.sleep(0.5)
    bridge.send(encode_signal(signal.SIGKILL))
    assert bridge.exited()[1] == signal.SIGKILL
    with open(reading, "rb") as out:
        assert len(out.read()) >= 3 * WINDOW_BYTES
    assert bridge.wait() == 137


def test_flood_of_the_listener(bridges: Bridges) -> None:
    """Connections that come and go without a word cost nothing that stays, and the job's streams go on meanwhile."""
    bridge = bridges()
    bridge.ready()
    bridge.start("sleep", "60")
    bridge.prepared()
    bridge.exec().connection.close()
    descriptors = len(os.listdir(f"/proc/{bridge.host_pid()}/fd"))
    for _ in range(500):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(bridge.address)
    assert bridge.exec().output("echo", "still here") == b"still here\n"
    eventually(lambda: len(os.listdir(f"/proc/{bridge.host_pid()}/fd")) <= descriptors + 1)
