"""The door, PID 1 around a sandboxed kernel, with small programs in the place of the runtime and of that kernel."""

import contextlib
import os
import resource
import select
import signal
import socket
import sys
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
from ringfence.sandbox.protocol import DETACH, END, HOLD, encode_go, encode_shutdown

WORDS_BYTES = 64 << 10
# A runtime leaves something behind and ends; what that is, KERNEL says.
RUNTIME = """#!{python} -IS
import os, sys, time
FIRST
if os.fork() == 0:
    os.setsid()
    KERNEL
"""
AGENT = "os.execv(sys.argv[1], sys.argv[1:2])"
IDLE = "time.sleep(1000)"


class Door(Frames):
    """A running door and what the host has of it: control socket, listener, words, log."""

    def __init__(
        self, directory: Path, *argv: str, log_bytes: int | str = 0, deadline_ms: int | str = 0
    ) -> None:
        ours, theirs = socket.socketpair()
        self.address = str(directory / "control.sock")
        self.words = directory / "words"
        self.log = directory / "log"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        words, log = os.open(self.words, flags, 0o600), os.open(self.log, flags, 0o600)
        log_read, self.log_write = os.pipe()
        self.trace, trace_write = os.pipe()
        descriptors = [theirs.fileno(), listener.fileno(), words, words, words, log_read, log, trace_write]
        command = [*UNSHARE, binary(), "--door", str(log_bytes), str(deadline_ms), *argv]
        self.pid = spawn(command, {3 + i: fd for i, fd in enumerate(descriptors)})
        for fd in (words, log, log_read, trace_write):
            os.close(fd)
        theirs.close()
        listener.close()
        self.status: int | None = None
        super().__init__(ours)

    def host_pid(self) -> int:
        """The door itself, as the host numbers it."""
        eventually(lambda: children(self.pid))
        return children(self.pid)[0]

    def kernel(self) -> int:
        """What the runtime has left behind, once the runtime itself is gone: it has a session of its own."""
        pid = self.host_pid()
        eventually(lambda: len(children(pid)) == 1 and sessions(pid) == set(children(pid)))
        return children(pid)[0]

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.address)
        return sock

    def output(self, *argv: str | bytes, **more: object) -> bytes:
        """What `argv` prints, run by the agent inside on a connection of its own."""
        frames = Frames(self.connect())
        try:
            frames.ready()
            return Frames.output(frames, *argv, **more)
        finally:
            frames.connection.close()

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """The exit status; a door that hangs fails the test."""
        if self.status is None:
            pidfd = os.pidfd_open(self.pid)
            with open(pidfd, closefd=True):
                assert select.select([pidfd], [], [], timeout_s)[0], "the door hangs"
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def close(self) -> None:
        self.connection.close()
        os.close(self.log_write)
        os.close(self.trace)
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def sessions(pid: int) -> set[int]:
    """The sessions of its children."""
    with contextlib.suppress(ProcessLookupError):
        return {os.getsid(child) for child in children(pid)}
    return set()


Doors = Callable[..., Door]


@pytest.fixture
def doors(tmp_path: Path) -> Iterator[Doors]:
    """Start doors; `kernel` is Python that runs in what the runtime leaves behind, `first` in the runtime before."""
    with contextlib.ExitStack() as stack:

        def start(
            kernel: str = AGENT, *, first: str = "", log_bytes: int | str = 0, deadline_ms: int = 0
        ) -> Door:
            runtime = tmp_path / "runtime"
            script = RUNTIME.format(python=sys.executable)
            runtime.write_text(script.replace("KERNEL", kernel).replace("FIRST", first))
            runtime.chmod(0o755)
            door = Door(tmp_path, str(runtime), binary(), log_bytes=log_bytes, deadline_ms=deadline_ms)
            stack.callback(door.close)
            return door

        yield start


def test_agent_behind_the_door(doors: Doors) -> None:
    """The agent inside has the host's control connection and is given what connects; the door ends with it."""
    door = doors()
    door.ready()
    door.start("sh", "-c", "read line; exit 5", flags=HOLD)
    door.prepared()
    early = door.connect()
    assert not select.select([early], [], [], 0.1)[0]
    door.send(encode_go())
    early.close()
    assert door.exited()[0] in (1, 5)
    assert door.wait() == 0


def test_exec_through_the_door(doors: Doors) -> None:
    """Connections are handed on, one like the other, and end with their clients."""
    door = doors()
    door.ready()
    door.start("sleep", "1000")
    door.prepared()
    for i in range(40):
        assert door.output("echo", str(i)) == b"%d\n" % i
    assert len(os.listdir(f"/proc/{door.host_pid()}/fd")) < 20


def test_what_the_door_keeps(doors: Doors) -> None:
    """After the start: no capability, none to be had, and no end of a pipe or socket that is the sandbox's."""
    door = doors(log_bytes=1000)
    door.ready()
    door.kernel()
    pid = door.host_pid()
    eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) == 12)
    status = status_of(pid)
    assert [int(status[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")] == [0] * 5
    assert status["NoNewPrivs"] == "1"
    assert int(status["VmRSS"].split()[0]) < 500
    kept = {fd: os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert {kept[fd] for fd in "012"} == {"/dev/null"}
    assert not {"3", "10"} & set(kept)
    for fd, name in kept.items():
        flags = int(Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()[1].split()[1], 8)
        assert flags & os.O_CLOEXEC or fd in "012", name
        assert not name.startswith("pipe:") or flags & os.O_ACCMODE == os.O_RDONLY
    # Words, lock, image and log; listener, feed, pipe of the log, two of its own. Nobody has words to say any more.
    files = [str(door.words)] * 3 + [str(door.log)]
    others = ["socket", "socket", "pipe", "anon_inode", "anon_inode"]
    assert sorted(name.split(":")[0] for fd, name in kept.items() if int(fd) > 2) == sorted(files + others)


def test_what_the_runtime_is_given(doors: Doors) -> None:
    """The runtime has an empty input, the pipe of its words, the agent's two sockets and the trace."""
    code = "print(*[n for n in range(64) if os.path.exists(f'/proc/self/fd/{n}')], sorted(os.environ), flush=True)"
    door = doors(
        IDLE, first=f"{code}; print(os.readlink('/proc/self/fd/0'), flush=True); os.write(10, b'trace')"
    )
    door.kernel()
    # 5 is the listing's own.
    eventually(lambda: door.words.read_text().count("\n") == 2)
    assert door.words.read_text().replace("'LC_CTYPE', ", "") == "0 1 2 3 4 10 ['PATH']\n/dev/null\n"
    assert os.read(door.trace, 100) == b"trace"


@pytest.mark.parametrize(
    ("first", "status"),
    [
        ("print('no', flush=True); sys.exit(7)", 7),
        ("sys.exit('because')", 1),
        ("os.kill(os.getpid(), 9)", 125),
    ],
)
def test_runtime_that_fails(doors: Doors, first: str, status: int) -> None:
    """The door ends with the runtime's status, and its words are kept."""
    door = doors(first=first)
    assert door.wait() == status
    assert door.words.read_text() == {7: "no\n", 1: "because\n", 125: ""}[status]


def test_runtime_that_cannot_run(tmp_path: Path) -> None:
    """A missing runtime is said to be that."""
    door = Door(tmp_path, "/no/such/runtime")
    assert door.wait() == 125
    assert door.words.read_text() == "the runtime cannot be executed\n"
    door.close()


@pytest.mark.parametrize("which", ["log_bytes", "deadline_ms"])
@pytest.mark.parametrize("given", ["", "x", "-1", "1x", "18446744073709551616"])
def test_bounds_must_be_numbers(tmp_path: Path, which: str, given: str) -> None:
    """What is no number of bytes or milliseconds starts nothing, rather than something without its bound."""
    marker = tmp_path / "marker"
    door = Door(tmp_path, "/usr/bin/touch", str(marker), **{which: given})
    assert door.wait() == 125
    assert not marker.exists()
    door.close()


@pytest.mark.parametrize("missing", [3, 4, 7, 8, 9])
def test_descriptors_that_must_be_there(tmp_path: Path, missing: int) -> None:
    """Without one of its descriptors the door starts nothing."""
    marker = tmp_path / "marker"
    with open(os.devnull, "r+b") as null:
        given = {fd: null.fileno() for fd in range(3, 11) if fd != missing}
        with socket.socket(socket.AF_UNIX) as sock:
            given |= {fd: sock.fileno() for fd in (3, 4) if fd != missing}
            pid = spawn([binary(), "--door", "100", "0", "/usr/bin/touch", str(marker)], given)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 125
    assert not marker.exists()


def test_only_the_needed_descriptors(tmp_path: Path) -> None:
    """Those that may be absent leave no hole that something of the door's own could fall into."""
    words = tmp_path / "words"
    ours, theirs = socket.socketpair()
    with open(words, "wb") as file, ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        given = {3: theirs.fileno(), 4: listener.fileno(), 7: file.fileno()}
        pid = spawn([binary(), "--door", "0", "0", "/bin/sh", "-c", "echo begun; echo ended >&2"], given)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert words.read_text() == "begun\nended\n"


def test_words_are_bounded(doors: Doors) -> None:
    """What is said beyond 64 KiB is read and dropped: nobody waits, no file grows."""
    door = doors(first="[os.write(1, b'w' * 65536) for _ in range(50)]")
    door.ready()
    assert door.words.read_bytes() == b"w" * WORDS_BYTES
    door.start("sh", "-c", "exit 3")
    door.prepared()
    assert door.exited() == (3, 0, 0)
    assert door.wait() == 0


def test_kernel_that_never_stops_talking(doors: Doors) -> None:
    """A flood of words costs the sandbox its own time; the door serves on in little memory, and ends when it must."""
    flood = "os.close(3), os.close(4); [os.write(2, b'w' * 4096) for _ in iter(int, 1)]"
    door = doors(f"pid = os.fork()\n    if pid == 0: {flood}\n    {AGENT}")
    door.ready()
    door.start("sleep", "1000", flags=HOLD)
    door.prepared()
    door.send(encode_go())
    eventually(lambda: door.words.stat().st_size == WORDS_BYTES)
    assert door.output("echo", "alive") == b"alive\n"
    status = Path(f"/proc/{door.host_pid()}/status").read_text()
    assert int(status.partition("VmRSS:")[2].split()[0]) < 500
    begin = time.monotonic()
    door.connection.close()  # the agent ends, and what it has left behind does not
    assert door.wait() == 0
    assert time.monotonic() - begin < 5
    assert door.words.stat().st_size == WORDS_BYTES


def test_log_of_a_detached_job(doors: Doors) -> None:
    """What the agent writes to the pipe arrives whole in the file, its last record too."""
    door = doors(log_bytes=1 << 20)
    door.ready()
    door.start(
        "sh",
        "-c",
        "seq 50000; exit 3",
        flags=DETACH,
        stdio=(door.log_write,),
        output_limit_bytes=(1 << 20) - 40,
    )
    door.prepared()
    door.connection.close()
    assert door.wait() == 0
    *lines, (stream, end) = parsed(door.log.read_bytes())
    assert b"".join(text for _, text in lines) == b"".join(b"%d\n" % i for i in range(1, 50001))
    assert (stream, protocol.decode_end(end)) == (END, (3, 0, 0, 0))


def test_log_is_bounded(doors: Doors) -> None:
    """Whatever comes through the pipe, the file has no more than it may; the writer is not kept waiting."""
    door = doors(IDLE, log_bytes=1000)
    for _ in range(100):
        os.write(door.log_write, bytes(4096))
    eventually(lambda: door.log.stat().st_size == 1000)
    os.kill(door.kernel(), signal.SIGKILL)
    assert door.wait() == 0
    assert door.log.stat().st_size == 1000


def test_log_is_kept_to_its_end(doors: Doors) -> None:
    """What lies in the pipe when all is over is still stored."""
    door = doors("os.read(3, 1)", log_bytes=1 << 20)
    pid = door.host_pid()
    door.kernel()
    os.kill(pid, signal.SIGSTOP)  # so that it sees the end and the output at once
    os.write(door.log_write, b"l" * 65536)
    door.sock.send(b"x")
    eventually(lambda: b"\nState:\tZ" in status_bytes(children(pid)[0]))
    os.kill(pid, signal.SIGCONT)
    assert door.wait() == 0
    assert door.log.stat().st_size == 65536


def status_bytes(pid: int) -> bytes:
    return Path(f"/proc/{pid}/status").read_bytes()


def test_full_disk(doors: Doors) -> None:
    """A file that cannot grow makes the door drop the rest, not stop."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))
    try:
        door = doors(IDLE, log_bytes=1 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    for _ in range(100):
        os.write(door.log_write, bytes(4096))
    assert door.log.stat().st_size == 5000
    os.kill(door.kernel(), signal.SIGKILL)
    assert door.wait() == 0


def test_flood_of_connections(doors: Doors) -> None:
    """With nobody taking them connections pile up to a bound; those beyond are closed, and the door rests."""
    door = doors(IDLE)
    door.kernel()
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(door.connect()) for _ in range(1500)]
        poll = select.poll()
        for sock in socks:
            poll.register(sock, select.POLLIN)
        eventually(lambda: len(poll.poll(0)) > 100)
        ticks = cpu_ticks(door.host_pid())
        time.sleep(0.2)
        assert cpu_ticks(door.host_pid()) - ticks < 3
        assert len(os.listdir(f"/proc/{door.host_pid()}/fd")) < 20
    assert door.status is None


def test_kernel_that_closes_its_feed(doors: Doors) -> None:
    """Without its other end each connection is closed at once, and the sandbox is over: what is left dies."""
    door = doors(f"os.close(4)\n    os.write(2, b'closed')\n    {IDLE}")
    eventually(lambda: door.words.read_bytes() == b"closed")
    begin, left = time.monotonic(), door.kernel()
    for _ in range(3):
        with door.connect() as sock:
            sock.settimeout(WAIT_S)
            assert sock.recv(1) == b""
    assert door.wait() == 0
    assert 1 < time.monotonic() - begin < 5
    eventually(lambda: not Path(f"/proc/{left}").exists())


def test_kernel_that_writes_to_its_feed(doors: Doors) -> None:
    """The door reads nothing from inside: who sends to it fills a buffer of its own, and waits."""
    door = doors(
        """import socket
    feed = socket.socket(fileno=4)
    feed.setblocking(False)
    while True:
        try: socket.send_fds(feed, [bytes(1000)], [3])
        except OSError: time.sleep(0.01)"""
    )
    door.kernel()
    time.sleep(0.2)
    ticks = cpu_ticks(door.host_pid())
    time.sleep(0.2)
    assert cpu_ticks(door.host_pid()) - ticks < 3
    assert len(os.listdir(f"/proc/{door.host_pid()}/fd")) < 20


def test_signals_to_the_door_do_nothing(doors: Doors) -> None:
    """The job is signalled by frames; what a runtime's own kill sends to PID 1 harms nobody."""
    door = doors()
    door.ready()
    door.start("sleep", "1000")
    door.prepared()
    for signo in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        os.kill(door.host_pid(), signo)
    assert door.output("echo", "alive") == b"alive\n"


# The clock

LATE = b"\ndeadline\n"


def test_time_is_up(doors: Doors) -> None:
    """What runs on after its time dies, whatever it does; the door says so last, and keeps what was said before."""
    door = doors(f"os.write(2, b'words')\n    {IDLE}", log_bytes=1000, deadline_ms=300)
    left = door.kernel()
    os.kill(left, signal.SIGSTOP)
    os.write(door.log_write, b"log")
    assert door.status is None
    begin = time.monotonic()
    os.kill(door.host_pid(), signal.SIGUSR1)
    assert door.wait() == 0
    assert 0.25 < time.monotonic() - begin < 3
    assert not Path(f"/proc/{left}").exists()
    assert (door.words.read_bytes(), door.log.read_bytes()) == (b"words" + LATE, b"log")


def test_time_counts_from_the_first_signal(doors: Doors) -> None:
    """Before the launcher's word no time passes; what comes after it does not move the end."""
    door = doors(IDLE, deadline_ms=600)
    door.kernel()
    with pytest.raises(AssertionError, match="hangs"):
        door.wait(1)
    begin = time.monotonic()
    while time.monotonic() - begin < 0.5:
        os.kill(door.host_pid(), signal.SIGUSR1)
        time.sleep(0.1)
    assert door.wait() == 0
    assert 0.55 < time.monotonic() - begin < 3
    assert door.words.read_bytes() == LATE


def test_no_time_limit(doors: Doors) -> None:
    """Without one SIGUSR1 is a signal like any other."""
    door = doors(IDLE)
    door.kernel()
    os.kill(door.host_pid(), signal.SIGUSR1)
    with pytest.raises(AssertionError, match="hangs"):
        door.wait(0.5)


@pytest.mark.parametrize("deadline_ms", [2_147_483_648, 4_611_686_018_427_387_903])
def test_time_limit_of_weeks(doors: Doors, deadline_ms: int) -> None:
    """More than epoll can wait for at once is waited for all the same: neither at an end at once, nor spinning."""
    door = doors(IDLE, deadline_ms=deadline_ms)
    door.kernel()
    os.kill(door.host_pid(), signal.SIGUSR1)
    time.sleep(0.1)
    ticks = cpu_ticks(door.host_pid())
    with pytest.raises(AssertionError, match="hangs"):
        door.wait(0.5)
    assert cpu_ticks(door.host_pid()) - ticks < 3


def test_end_before_the_time_is_up(doors: Doors) -> None:
    """A sandbox that ended by itself is not said to be late, even if the last of it takes until then."""
    door = doors(f"os.close(4)\n    {IDLE}", deadline_ms=1000)
    door.kernel()
    os.kill(door.host_pid(), signal.SIGUSR1)
    begin = time.monotonic()
    assert door.wait() == 0
    assert 1.5 < time.monotonic() - begin < 5
    assert door.words.read_bytes() == b""


def test_time_is_up_for_a_kernel_that_never_stops_talking(doors: Doors) -> None:
    """Neither the bound of the words nor their flood keeps the door from its time or from its last word."""
    door = doors("[os.write(2, b'w' * 4096) for _ in iter(int, 1)]", deadline_ms=300)
    eventually(lambda: door.words.stat().st_size == WORDS_BYTES)
    begin = time.monotonic()
    os.kill(door.host_pid(), signal.SIGUSR1)
    assert door.wait() == 0
    assert time.monotonic() - begin < 5
    assert door.words.read_bytes() == b"w" * WORDS_BYTES + LATE


def test_one_process_of_the_sandbox_dies(doors: Doors) -> None:
    """When the one with the feed is gone, the rest has two seconds, and dies with the door; no other means anything."""
    gofer = "if os.fork() == 0:\n        if os.fork(): os._exit(0)\n        os.close(4)\n        os.fork()"
    door = doors(f"{gofer}\n    {IDLE}")
    pid = door.host_pid()
    # Both are of the session that was made for them: the runtime itself is gone.
    eventually(
        lambda: len(children(pid)) == 2 and len(sessions(pid) & set(children(pid))) == len(sessions(pid)) == 1
    )
    (kernel,) = sessions(pid)
    (other,) = set(children(pid)) - {kernel}
    eventually(lambda: children(other))
    os.kill(other, signal.SIGKILL)  # what it has forked takes its place
    eventually(lambda: other not in children(pid) and len(children(pid)) == 2)
    (other,) = set(children(pid)) - {kernel}
    with pytest.raises(AssertionError, match="hangs"):
        door.wait(2.5)
    begin = time.monotonic()
    os.kill(kernel, signal.SIGKILL)
    assert door.wait() == 0
    assert 1 < time.monotonic() - begin < 5
    eventually(lambda: not Path(f"/proc/{other}").exists())


def test_processes_by_the_thousand(doors: Doors) -> None:
    """Processes that a sandbox leaves to the door to reap do not keep it from its work, or from its end."""
    door = doors(
        """if os.fork() == 0: os.execv(sys.argv[1], sys.argv[1:2])
    os.close(3), os.close(4)
    while True:
        if os.fork() == 0:
            os.fork()
            os._exit(0)
        os.wait()"""
    )
    door.ready()
    door.start("sleep", "1000")
    door.prepared()
    assert door.output("echo", "alive") == b"alive\n"
    door.send(encode_shutdown())
    assert door.wait() == 0


def test_what_the_runtime_leaves_dead(doors: Doors) -> None:
    """A helper of the runtime's that dies while it still starts is not the sandbox's end."""
    door = doors(
        first="""child = os.fork()
if child == 0:
    os.fork()
    os._exit(0)
os.waitpid(child, 0)
time.sleep(0.3)"""
    )
    door.ready()
    door.start("sh", "-c", "sleep 2.5; exit 4")
    door.prepared()
    assert door.exited() == (4, 0, 0)
