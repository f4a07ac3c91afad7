"""What the agent does for a host that cannot reach into its kernel: it carries a terminal's bytes, and reports."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agents import AS_NOBODY, Agent, Frames, children, cpu_ticks, eventually, starting
from ringfence.errors import SandboxError
from ringfence.sandbox import protocol
from ringfence.sandbox.protocol import (
    EXITED,
    HOLD,
    OUTPUT_TRUNCATED,
    PREPARED,
    RELAY,
    REPORTED,
    TIMED_OUT,
    TTY,
    encode_go,
    encode_report,
    encode_resize,
    encode_shutdown,
)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Start agents; `before` is put before the agent's own command line."""
    with starting(tmp_path) as start:
        yield start


@pytest.fixture
def agent(agents: Callable[..., Agent]) -> Agent:
    agent = agents()
    assert agent.ready() == 1
    return agent


@pytest.fixture
def relayed() -> Iterator[Callable[..., socket.socket]]:
    """START a command on a terminal that the agent relays, wait until it is prepared, and give our end."""
    with contextlib.ExitStack() as stack:

        def start(
            frames: Frames, *argv: str, early: bytes = b"", flags: int = 0, **more: object
        ) -> socket.socket:
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            ours.settimeout(10)
            ours.sendall(early)
            with theirs:
                frames.start(*argv, flags=TTY | RELAY | flags, stdio=(theirs.fileno(),), **more)
            payload, descriptors = frames.expect(PREPARED)
            assert descriptors == []
            assert protocol.decode_prepared(payload)[1] == 3
            return ours

        yield start


def read_all(sock: socket.socket) -> bytes:
    """All that comes until the agent closes its end."""
    output = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            output += piece
    return output.replace(b"\r\n", b"\n")


def numbers(last: int) -> bytes:
    return b"".join(b"%d\n" % i for i in range(1, last + 1))


Relayed = Callable[..., socket.socket]


def test_terminal_through_a_relay(agent: Agent, relayed: Relayed) -> None:
    """The job has a terminal of the asked size; all it says comes before EXITED, and then the end."""
    script = "test -t 0 && test -t 1 && test -t 2 && stty size </dev/tty && ls /proc/self/fd | wc -l; seq 20000; exit 3"
    ours = relayed(agent, "sh", "-c", script, cols=101, rows=37)
    assert read_all(ours) == b"37 101\n4\n" + numbers(20000)
    assert agent.exited() == (3, 0, 0)
    assert agent.wait() == 3


def test_last_words_through_a_relay(agent: Agent, relayed: Relayed) -> None:
    """EXITED comes after all output, so that who has it need not wait for more."""
    ours = relayed(agent, "echo", "last words")
    assert agent.exited() == (0, 0, 0)
    ours.setblocking(False)
    assert read_all(ours) == b"last words\n"


def test_early_input_is_not_lost(agent: Agent, relayed: Relayed) -> None:
    """What was typed before the job had opened its terminal reaches it."""
    ours = relayed(agent, "sh", "-c", "stty -echo; read word; echo got $word", early=b"hello\n")
    assert read_all(ours).endswith(b"got hello\n")
    assert agent.exited() == (0, 0, 0)


def test_held_job_with_a_relay(agent: Agent, relayed: Relayed) -> None:
    """HOLD holds a job with a relay as any other."""
    ours = relayed(agent, "echo", "now", flags=HOLD)
    ours.settimeout(0.1)
    with pytest.raises(TimeoutError):
        ours.recv(1)
    agent.send(encode_go())
    ours.settimeout(10)
    assert read_all(ours) == b"now\n"
    assert agent.exited() == (0, 0, 0)


def test_interrupt_and_resize_through_a_relay(agent: Agent, relayed: Relayed) -> None:
    """Ctrl-C reaches the foreground group; RESIZE changes the size and tells the job."""
    script = "trap 'stty size' WINCH; trap 'exit 9' INT; echo go; while :; do sleep 0.05; done"
    ours = relayed(agent, "sh", "-c", script, cols=80, rows=24)
    assert ours.recv(64) == b"go\r\n"
    agent.send(encode_resize(132, 43))
    assert ours.recv(64).startswith(b"43 132\r\n")
    ours.send(b"\x03")
    assert agent.exited() == (9, 0, 0)


def test_slow_reader_of_a_relay(agent: Agent, relayed: Relayed) -> None:
    """A reader that stops makes the job wait, and nobody else: nothing is lost and nothing spins."""
    ours = relayed(agent, "sh", "-c", "seq 200000")
    time.sleep(0.2)
    ticks = cpu_ticks(agent.host_pid())
    time.sleep(0.3)
    assert agent.exec().output("echo", "alive") == b"alive\n"
    assert cpu_ticks(agent.host_pid()) - ticks < 5
    assert read_all(ours) == numbers(200000)
    assert agent.exited() == (0, 0, 0)


def test_job_that_does_not_read_a_relay(agent: Agent, relayed: Relayed) -> None:
    """Input that the job does not read stays with who types; the agent serves on, and sees when that one leaves."""
    ours = relayed(
        agent, "sh", "-c", "stty raw -echo; trap 'exit 8' HUP; echo go; while :; do sleep 0.05; done"
    )
    assert ours.recv(64).startswith(b"go")
    ours.settimeout(0.3)
    with pytest.raises(TimeoutError):
        ours.sendall(bytes(4 << 20))
    ticks = cpu_ticks(agent.host_pid())
    assert agent.exec().output("sh", "-c", "sleep 0.2; echo alive") == b"alive\n"
    assert cpu_ticks(agent.host_pid()) - ticks < 5
    ours.close()
    assert agent.exited() == (8, 0, 0)


@pytest.mark.parametrize(
    "end", [socket.socket.close, lambda sock: sock.shutdown(socket.SHUT_WR)], ids=["close", "shut"]
)
def test_end_of_a_relay_hangs_up(
    agent: Agent, relayed: Relayed, end: Callable[[socket.socket], None], tmp_path: Path
) -> None:
    """The end of the host's side is to the job what the end of a terminal is: SIGHUP, and an end of its input."""
    marker = tmp_path / "end"
    script = f"trap 'cat; echo ended >{marker}; exit 7' HUP; echo go; while :; do sleep 0.05; done"
    ours = relayed(agent, "sh", "-c", script)
    assert ours.recv(64) == b"go\r\n"
    end(ours)
    assert agent.exited() == (7, 0, 0)
    assert marker.read_text() == "ended\n"


def test_reader_that_is_gone_is_no_sigpipe(agent: Agent, relayed: Relayed) -> None:
    """An agent that has output for a host that left goes on, and the job's own end is told."""
    ours = relayed(agent, "sh", "-c", "trap '' HUP; echo go; sleep 0.2; seq 100000 2>/dev/null; exit 5")
    assert ours.recv(64) == b"go\r\n"
    ours.close()
    assert agent.exited() == (5, 0, 0)


def test_job_that_lets_go_of_its_terminal(agent: Agent, relayed: Relayed) -> None:
    """A job may close its terminal and live on: its reader has the end, the job is not hung up."""
    ours = relayed(agent, "sh", "-c", "echo bye; exec </dev/null >/dev/null 2>&1; sleep 0.3; exit 4")
    assert read_all(ours) == b"bye\n"
    assert agent.exited() == (4, 0, 0)


def test_last_of_a_relay_waits_for_its_reader(agent: Agent, relayed: Relayed) -> None:
    """What a job said before its end is passed on as slowly as it is read; EXITED comes after."""
    ours = relayed(agent, "sh", "-c", "stty raw; head -c 4000 /dev/zero; sleep 0.3; head -c 300000 /dev/zero")
    time.sleep(0.6)  # it is stuck in its second head
    begin, total = time.monotonic(), 0
    while time.monotonic() - begin < 0.5:
        total += len(ours.recv(20000))
        time.sleep(0.01)
    assert total + len(read_all(ours)) == 304_000
    assert agent.exited() == (0, 0, 0)


# Fills all that is between it and a reader that does not read, and ends.
FILL = """
import os, sys, tty
tty.setraw(1)
os.set_blocking(1, False)
count = 0
idle = 0
import time
while idle < 20:
    try:
        count += os.write(1, bytes(1000)); idle = 0
    except BlockingIOError:
        idle += 1; time.sleep(0.01)
open(sys.argv[1], 'w').write(str(count))
"""


def fill(frames: Frames, relayed: Relayed, marker: Path, **more: object) -> tuple[socket.socket, int]:
    ours = relayed(frames, "python3", "-c", FILL, str(marker), **more)
    eventually(lambda: marker.exists() and marker.read_text())
    return ours, int(marker.read_text())


def test_reader_that_comes_late_has_all(agent: Agent, relayed: Relayed, tmp_path: Path) -> None:
    """A job is over with its output still in the terminal: it waits there for its reader, for a while."""
    ours, count = fill(agent, relayed, tmp_path / "count")
    time.sleep(2.5)  # longer than killed processes are waited for
    assert len(read_all(ours)) == count
    assert agent.exited() == (0, 0, 0)


def test_reader_that_never_comes(agent: Agent, relayed: Relayed, tmp_path: Path) -> None:
    """After five seconds without a byte taken the rest is given up, and said to be lost; an exec's costs no other."""
    agent.busy()
    frames = agent.exec()
    _ours, _count = fill(frames, relayed, tmp_path / "count")
    begin = time.monotonic()
    assert agent.exec().output("echo", "alive") == b"alive\n"
    ticks = cpu_ticks(agent.host_pid())
    assert frames.exited() == (0, 0, OUTPUT_TRUNCATED)
    assert 3 < time.monotonic() - begin < 9
    assert cpu_ticks(agent.host_pid()) - ticks < 5


def test_shutdown_does_not_wait_for_a_reader(agent: Agent, relayed: Relayed, tmp_path: Path) -> None:
    """Who stops a sandbox need not read its terminal first."""
    other = agent.connect()
    _ours, _count = fill(agent, relayed, tmp_path / "count")
    other.ready()
    begin = time.monotonic()
    other.send(encode_shutdown())
    assert agent.exited()[2] == OUTPUT_TRUNCATED
    assert time.monotonic() - begin < 4


def test_deadline_does_not_wait_for_a_reader(agent: Agent, relayed: Relayed) -> None:
    """A job killed by its time limit is over soon, read or not."""
    _ours = relayed(agent, "sh", "-c", "seq 1000000", deadline_ms=2000)
    begin = time.monotonic()
    assert agent.exited() == (137, 9, TIMED_OUT | OUTPUT_TRUNCATED)
    assert time.monotonic() - begin < 6


def test_background_process_keeps_no_relay_open(agent: Agent, relayed: Relayed) -> None:
    """A process left behind on an exec's terminal does not delay the exec's end."""
    agent.busy()
    frames = agent.exec()
    begin = time.monotonic()
    ours = relayed(
        frames, "sh", "-c", "setsid sh -c 'while :; do echo more; sleep 0.01; done' & echo done; sleep 0.1"
    )
    assert b"done\n" in read_all(ours)
    assert frames.exited() == (0, 0, 0)
    assert time.monotonic() - begin < 3


def test_client_gone_takes_its_relay_along(agent: Agent, relayed: Relayed) -> None:
    """With the connection the job and its relay are gone."""
    agent.busy()
    frames = agent.exec()
    ours = relayed(frames, "sh", "-c", "trap '' HUP; echo go; sleep 1000")
    assert ours.recv(64) == b"go\r\n"
    frames.connection.close()
    assert read_all(ours) == b""
    eventually(lambda: len(children(agent.host_pid())) == 1)


@pytest.mark.parametrize("kind", ["file", "pipe", "unconnected"])
def test_relay_must_be_connected(agent: Agent, kind: str, tmp_path: Path) -> None:
    """What is no connected socket could not be read: nothing runs."""
    with contextlib.ExitStack() as stack:
        if kind == "file":
            descriptor = stack.enter_context(open(tmp_path / "file", "wb")).fileno()
        elif kind == "pipe":
            reading, descriptor = os.pipe()
            stack.callback(os.close, reading)
            stack.callback(os.close, descriptor)
        else:
            descriptor = stack.enter_context(socket.socket(socket.AF_UNIX)).fileno()
        agent.start("true", flags=TTY | RELAY, stdio=(descriptor,))
        assert agent.failed()[0] == 2
    assert agent.wait() == 125


def test_descriptors_sent_to_a_relay_are_closed(agent: Agent, relayed: Relayed) -> None:
    """Only bytes pass: a descriptor that comes along stays with nobody."""
    ours = relayed(agent, "sh", "-c", "stty -echo; echo go; read word; echo $word; sleep 1000")
    assert ours.recv(64) == b"go\r\n"
    reading, writing = os.pipe()
    socket.send_fds(ours, [b"word\n"], [writing])
    os.close(writing)
    assert ours.recv(64) == b"word\r\n"
    assert os.read(reading, 1) == b""
    os.close(reading)


# Reports


def held(agent: Agent, *argv: str) -> int:
    """START `argv` with HOLD; return the pid of its process on the host."""
    agent.start(*argv, flags=HOLD)
    agent.prepared()
    (pid,) = children(agent.host_pid())
    return pid


def report(frames: Frames) -> dict[str, str]:
    frames.send(encode_report())
    payload, descriptors = frames.expect(REPORTED)
    assert descriptors == []
    return protocol.decode_reported(payload)


def test_report_is_what_the_kernel_says(agent: Agent) -> None:
    """All that is told of a held job is word for word what its /proc has; asking lets nothing go."""
    pid = held(agent, "sh", "-c", "exit 3")
    told = report(agent)
    assert set(told) == protocol.REPORT_NAMES
    for name in ("limits", "mountinfo", "net/dev", "uid_map", "gid_map"):
        assert told[name] == Path(f"/proc/{pid}/{name}").read_text(), name
    status = Path(f"/proc/{pid}/status").read_text().replace(f"Pid:\t{pid}\n", "Pid:\t2\n")
    for line in ("Seccomp:", "CapEff:", "NoNewPrivs:", "Uid:", "Groups:", "Pid:"):
        (expected,) = [text for text in status.splitlines() if text.startswith(line)]
        assert expected in told["status"].splitlines()
    assert told["version"] == Path("/proc/version").read_text()
    assert told["hostname"] == os.uname().nodename
    assert told["no_new_privileges"] == "0"
    assert report(agent)["limits"] == told["limits"]
    agent.send(encode_go())
    assert agent.exited() == (3, 0, 0)


@pytest.mark.requires("root")
@pytest.mark.parametrize("hidden", [False, True])
def test_report_leaves_out_what_is_closed(agents: Callable[..., Agent], hidden: bool) -> None:
    """An agent without rights tells what it may read, and nothing in place of the rest."""
    hide = "mount -o remount,hidepid=invisible /proc && " if hidden else ""
    agent = agents("sh", "-c", hide + 'exec "$@"', "sh", *AS_NOBODY, "--no-new-privs")
    agent.ready()
    held(agent, "true")
    told = report(agent)
    assert told["no_new_privileges"] == "1"
    general = {"version", "hostname", "no_new_privileges"}
    assert set(told) == general if hidden else set(told) > general
    assert all(told.values())
    agent.send(encode_go())
    assert agent.exited() == (0, 0, 0)


def test_report_of_an_exec(agent: Agent) -> None:
    """Each connection is told of its own job."""
    agent.busy()
    frames = agent.exec()
    frames.start("true", flags=HOLD)
    pid = frames.prepared()
    assert f"\nPid:\t{pid}\n" in report(frames)["status"]
    frames.send(encode_go())
    assert frames.exited() == (0, 0, 0)


@pytest.mark.parametrize("when", ["running", "after go"])
def test_report_only_before_go(agent: Agent, when: str) -> None:
    """Once a job runs, what the kernel says of it is the job's own work: a protocol error."""
    agent.busy()
    frames = agent.exec()
    frames.start("sleep", "1000", flags=HOLD if when == "after go" else 0)
    frames.prepared()
    if when == "after go":
        frames.send(encode_go())
    frames.send(encode_report())
    assert frames.ended()
    assert agent.exec().output("echo", "alive") == b"alive\n"


def test_report_of_a_dead_job(agent: Agent) -> None:
    """Asked for a held job that was killed, the agent tells its end, after a report at most."""
    os.kill(held(agent, "true"), signal.SIGKILL)
    with contextlib.suppress(SandboxError):  # it may be over before it is asked
        agent.send(encode_report())
    frame = agent.connection.recv()
    assert frame is not None
    if frame[0] == REPORTED:
        frame = agent.connection.recv()
        assert frame is not None
    assert frame[0] == EXITED
    assert protocol.decode_exited(frame[2]) == (137, 9, 0)


# Mounts whose lines in mountinfo are some 7 KiB each.
MOUNTS = """
base=$1; count=$2; shift 2
d=$base; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do d=$d/$(printf '%0250d' 0); done
mkdir -p $d; for i in $(seq $count); do mount --bind $d $d; done
exec "$@"
"""


@pytest.mark.requires("root")
@pytest.mark.parametrize("mounts", [32, 60])
def test_large_report(agents: Callable[..., Agent], tmp_path: Path, mounts: int) -> None:
    """A report larger than a socket's buffer comes whole; what is beyond the bound is left out, and nothing else."""
    (tmp_path / "mounts").mkdir()
    agent = agents("sh", "-c", MOUNTS, "sh", str(tmp_path / "mounts"), str(mounts))
    agent.ready()
    pid = held(agent, "true")
    mountinfo = Path(f"/proc/{pid}/mountinfo").read_text()
    assert (len(mountinfo) > protocol.MAX_REPORT_BYTES) == (mounts == 60)
    assert len(mountinfo) > 212992  # net.core.wmem_default
    told = report(agent)
    assert told.get("mountinfo") == (mountinfo if mounts == 32 else None)
    assert set(told) >= protocol.REPORT_NAMES - {"mountinfo"}
    agent.send(encode_go())
    assert agent.exited() == (0, 0, 0)


@pytest.mark.requires("root")
def test_large_report_that_nobody_reads(agents: Callable[..., Agent], tmp_path: Path) -> None:
    """A host that asks and does not read is given up soon, and its job with it."""
    (tmp_path / "mounts").mkdir()
    agent = agents("sh", "-c", MOUNTS, "sh", str(tmp_path / "mounts"), "32")
    agent.ready()
    pid = held(agent, "true")
    assert pid > 0
    begin = time.monotonic()
    agent.send(encode_report())
    assert agent.wait() == 137
    assert time.monotonic() - begin < 2
