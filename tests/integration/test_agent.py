"""The agent itself, as PID 1 of a pid namespace, driven over its sockets as the launcher drives it."""

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agents import (
    AS_NOBODY,
    ENV,
    WAIT_S,
    Agent,
    Frames,
    binary,
    children,
    command_line,
    cpu_ticks,
    eventually,
    parsed,
    starting,
    status_of,
)
from ringfence.errors import SandboxError
from ringfence.sandbox import protocol
from ringfence.sandbox.protocol import (
    DETACH,
    END,
    HOLD,
    PREPARED,
    READY,
    RELAY,
    STDERR,
    STDOUT,
    TIMED_OUT,
    TTY,
    encode,
    encode_go,
    encode_report,
    encode_resize,
    encode_shutdown,
    encode_signal,
    encode_start,
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
def log(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    yield fd, path
    os.close(fd)


def records(path: Path) -> list[tuple[int, bytes]]:
    return parsed(path.read_bytes())


# A job and its end


@pytest.mark.parametrize("code", [0, 1, 7, 125, 255])
def test_exit_code_is_the_jobs_own(agent: Agent, code: int) -> None:
    """The job's exit code is reported, and is the agent's own."""
    agent.start("sh", "-c", f"exit {code}")
    assert agent.prepared() > 1
    assert agent.exited() == (code, 0, 0)
    assert agent.ended()
    assert agent.wait() == code


@pytest.mark.parametrize("signo", [signal.SIGKILL, signal.SIGSEGV, signal.SIGPIPE])
def test_death_by_signal_is_told(agent: Agent, signo: int) -> None:
    """A killed job gives 128 + signal and the signal."""
    agent.start("sh", "-c", f"kill -{int(signo)} $$")
    agent.prepared()
    assert agent.exited() == (128 + signo, signo, 0)
    assert agent.wait() == 128 + signo


def test_bytes_pass_unchanged(agent: Agent) -> None:
    """Argv, environment, standard streams and directory are exactly those of START, whatever their bytes."""
    argv = [
        b"sh",
        b"-c",
        b'pwd; printf "%s\\n" "$@"; env; cat; cat >&2 /dev/null',
        b"sh",
        b"a b",
        b"",
        b"\xff\n'\"",
    ]
    reading, writing = os.pipe()
    source, feed = os.pipe()
    os.write(feed, bytes(range(256)))
    os.close(feed)
    agent.start(
        *argv, stdio=(source, writing, writing), env=[b"PATH=/usr/bin:/bin", b"X=\xfe\xff"], cwd=b"/usr/bin"
    )
    os.close(writing)
    os.close(source)
    with open(reading, "rb") as pipe:
        output = pipe.read()
    assert output.startswith(b"/usr/bin\na b\n\n\xff\n'\"\n")
    assert output.endswith(bytes(range(256)))
    assert b"X=\xfe\xff\n" in output
    assert b"LC_ALL" not in output


def test_large_command_line(agent: Agent) -> None:
    """A command line of 1.5 MB, larger than any socket buffer, arrives whole."""
    output = agent.output("sh", "-c", 'echo "$# ${#1}"', "sh", *["x" * 15000] * 100)
    assert output == b"100 15000\n"


def test_header_in_pieces(agent: Agent) -> None:
    """Frames that arrive byte by byte mean the same."""
    frame = encode_start([b"sh", b"-c", b"exit 3"], ENV, b"/")
    with open(os.devnull, "r+b") as null:
        agent.send(frame[:1], (null.fileno(),) * 3)
    for i in range(1, len(frame)):
        agent.sock.send(frame[i : i + 1])
    agent.prepared()
    assert agent.exited() == (3, 0, 0)


def test_nothing_outlives_the_main_job(agent: Agent) -> None:
    """When the main job ends, what it left in sessions of its own is killed, and quickly."""
    begin = time.monotonic()
    agent.start("sh", "-c", "for i in 1 2 3; do setsid sh -c 'trap \"\" TERM HUP; sleep 1000' & done; exit 4")
    agent.prepared()
    assert agent.exited() == (4, 0, 0)
    assert agent.wait() == 4
    assert time.monotonic() - begin < 2


def test_orphans_are_reaped(agent: Agent) -> None:
    """No zombie is left of orphans while the job runs on."""
    script = """
        for i in $(seq 40); do (true & true &) ; done
        for i in $(seq 200); do
          grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | grep -q . || exit 0
          sleep 0.01
        done
        exit 1"""
    agent.start("sh", "-c", script)
    agent.prepared()
    assert agent.exited() == (0, 0, 0)


# What cannot run


@pytest.mark.parametrize(
    ("argv", "cwd", "stage", "status"),
    [
        (["no-such-program"], b"/", 4, 127),
        (["/no/such/program"], b"/", 4, 127),
        ([""], b"/", 4, 127),
        (["/etc/passwd/x"], b"/", 4, 127),
        (["/etc/passwd"], b"/", 4, 126),
        (["/usr"], b"/", 4, 126),
        (["true"], b"/no/such/directory", 3, 125),
        (["true"], b"/etc/passwd", 3, 125),
    ],
)
def test_what_cannot_run(agent: Agent, argv: list[str], cwd: bytes, stage: int, status: int) -> None:
    """Each reason is told by its stage, and the agent exits as `run` does."""
    agent.start(*argv, cwd=cwd)
    if stage == 4:
        agent.prepared()
    got, errno = agent.failed()
    assert (got, errno > 0) == (stage, True)
    assert agent.ended()
    assert agent.wait() == status


@pytest.mark.parametrize("flags", [0, TTY, DETACH, TTY | DETACH])
def test_what_cannot_run_is_told_at_once(agent: Agent, log: tuple[int, Path], flags: int) -> None:
    """Nothing is waited for that a job which never was could have said, whatever its streams are."""
    begin = time.monotonic()
    agent.start("true", flags=flags, cwd=b"/no/such", stdio=(log[0],) if flags & DETACH else None)
    assert agent.failed()[0] == 3
    assert agent.wait() == 125
    assert time.monotonic() - begin < 1


def test_no_shell_for_what_is_no_program(agent: Agent, tmp_path: Path) -> None:
    """A text without #! is not given to a shell."""
    script = tmp_path / "script"
    script.write_text("exit 0\n")
    script.chmod(0o755)
    agent.start(str(script))
    agent.prepared()
    assert agent.failed()[0] == 4
    assert agent.wait() == 126


def test_search_goes_by_the_jobs_path(agent: Agent, tmp_path: Path) -> None:
    """The first executable in the job's own PATH runs; one without permission is passed over."""
    for name, mode in (("a", 0o644), ("b", 0o755), ("c", 0o755)):
        (tmp_path / name).mkdir()
        program = tmp_path / name / "prog"
        program.write_text(f"#!/bin/sh\necho {name}\n")
        program.chmod(mode)
    path = f"PATH=/no/such:{tmp_path}/a:{tmp_path}/b:{tmp_path}/c".encode()
    assert agent.output("prog", env=[path]) == b"b\n"


def test_permission_is_remembered(agent: Agent, tmp_path: Path) -> None:
    """If all that the search found may not be executed, that is the reason, not that nothing was found."""
    (tmp_path / "prog").write_text("x")
    agent.start("prog", env=[f"PATH={tmp_path}:/no/such".encode()])
    agent.prepared()
    agent.failed()
    assert agent.wait() == 126


# The gate


def test_held_process_has_nothing_but_its_streams(agent: Agent, tmp_path: Path) -> None:
    """Before GO: three descriptors, a session of its own, no signal blocked, ignored or caught."""
    marker = tmp_path / "marker"
    agent.start("touch", str(marker), flags=HOLD)
    inner = agent.prepared()
    (pid,) = children(agent.host_pid())
    status = status_of(pid)
    assert int(status["NSpid"].split()[-1]) == inner
    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
    assert {os.readlink(f"/proc/{pid}/fd/{i}") for i in range(3)} == {"/dev/null"}
    assert [int(status[name], 16) for name in ("SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd")] == [0] * 5
    assert int(status["NSsid"].split()[-1]) == int(status["NSpgid"].split()[-1]) == inner
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGCONT)
    assert not select.select([agent.sock], [], [], 0.05)[0]
    assert not marker.exists()
    agent.send(encode_go())
    assert agent.exited() == (0, 0, 0)
    assert marker.exists()


@pytest.mark.parametrize("flags", [HOLD, HOLD | DETACH])
def test_no_go_no_job(agent: Agent, tmp_path: Path, log: tuple[int, Path], flags: int) -> None:
    """A launcher that dies before GO has started nothing, detached or not."""
    marker = tmp_path / "marker"
    agent.start("touch", str(marker), flags=flags, stdio=(log[0],) if flags & DETACH else None)
    agent.prepared()
    agent.connection.close()
    assert agent.wait() == 137
    assert not marker.exists()


def test_go_may_come_early(agent: Agent) -> None:
    """GO right behind START is not lost."""
    agent.start("sh", "-c", "exit 6", flags=HOLD)
    agent.send(encode_go())
    agent.prepared()
    assert agent.exited() == (6, 0, 0)


@pytest.mark.parametrize("feed", [False, True])
@pytest.mark.parametrize("flags", [0, HOLD])
def test_nothing_starts_before_the_main_job(
    agents: Callable[..., Agent], tmp_path: Path, flags: int, feed: bool
) -> None:
    """Until the main job is let go no connection is served: nothing runs before limits are set and proof is taken."""
    agent = agents(feed=feed)
    agent.ready()
    early = agent.connect()
    early.start("touch", str(tmp_path / "marker"))
    assert not select.select([early.sock], [], [], 0.1)[0]
    agent.start("sleep", "1000", flags=flags)
    agent.prepared()
    late = agent.connect()
    if flags & HOLD:
        assert not select.select([early.sock, late.sock], [], [], 0.1)[0]
        assert not (tmp_path / "marker").exists()
        agent.send(encode_go())
    early.ready()
    early.prepared()
    assert early.exited() == (0, 0, 0)
    assert (tmp_path / "marker").exists()
    late.ready()
    assert late.output("echo", "served") == b"served\n"


def test_nothing_starts_without_a_main_job(agent: Agent, tmp_path: Path) -> None:
    """A launcher that goes away before its START takes with it what has connected meanwhile; nothing of that runs."""
    early = agent.connect()
    early.start("touch", str(tmp_path / "marker"))
    agent.connection.close()
    assert agent.wait() == 0
    with contextlib.suppress(SandboxError, OSError):  # reset, as it was never accepted
        assert early.ended()
    assert not (tmp_path / "marker").exists()


# Terminals


def terminal(frames: Frames) -> int:
    payload, (master,) = frames.expect(PREPARED)
    assert protocol.decode_prepared(payload)[1] == 3
    return master


def read_terminal(master: int) -> bytes:
    """All that is written to the terminal until its last user has closed it."""
    output = b""
    with contextlib.suppress(OSError):
        while piece := os.read(master, 4096):
            output += piece
    os.close(master)
    return output


def test_terminal_of_its_own(agent: Agent) -> None:
    """A job with TTY has a terminal of its own, of the asked size, on all streams, and loses no output."""
    script = (
        "test -t 0 && test -t 1 && test -t 2 && stty size </dev/tty && ls /proc/self/fd | wc -l; seq 2000"
    )
    agent.start("sh", "-c", script, flags=TTY, cols=101, rows=37)
    output = read_terminal(terminal(agent)).replace(b"\r\n", b"\n")
    assert output.startswith(b"37 101\n4\n")  # 3 is ls's own
    assert output.endswith(b"1999\n2000\n")
    assert agent.exited() == (0, 0, 0)


def test_fast_end_loses_no_output(agent: Agent) -> None:
    """What a job wrote to its terminal before it died is still there when the master arrives."""
    agent.start("echo", "last words", flags=TTY)
    time.sleep(0.1)
    assert read_terminal(terminal(agent)) == b"last words\r\n"


def test_interrupt_and_resize(agent: Agent) -> None:
    """Ctrl-C reaches the foreground group; RESIZE changes the size and tells the job."""
    script = "trap 'stty size' WINCH; trap 'exit 9' INT; echo go; while :; do sleep 0.05; done"
    agent.start("sh", "-c", script, flags=TTY, cols=80, rows=24)
    master = terminal(agent)
    assert os.read(master, 64) == b"go\r\n"
    agent.send(encode_resize(132, 43))
    assert os.read(master, 64) == b"43 132\r\n"
    os.write(master, b"\x03")
    assert agent.exited() == (9, 0, 0)
    os.close(master)


# Signals, deadlines, ends


def test_signal_reaches_the_whole_group(agent: Agent) -> None:
    """SIGNAL on the control connection goes to the main job's process group."""
    reading, writing = os.pipe()
    script = """
        trap 'child=heard' USR1
        sh -c 'trap "exit 5" USR1; echo go; while :; do sleep 0.05; done' & wait $!; wait $!; exit $?"""
    with open(os.devnull, "r+b") as null:
        agent.start("sh", "-c", script, stdio=(null.fileno(), writing, null.fileno()))
    os.close(writing)
    agent.prepared()
    assert os.read(reading, 16) == b"go\n"
    agent.send(encode_signal(signal.SIGUSR1))
    assert agent.exited()[0] == 5
    os.close(reading)


@pytest.mark.parametrize("signo", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2"])
def test_signals_to_the_agent_are_forwarded(agent: Agent, signo: str) -> None:
    """What `crun kill` sends to PID 1 reaches the main job."""
    reading, writing = os.pipe()
    with open(os.devnull, "r+b") as null:
        script = f"trap 'exit 5' {signo}; echo go; while :; do sleep 0.02; done"
        agent.start("sh", "-c", script, stdio=(null.fileno(), writing, null.fileno()))
    os.close(writing)
    agent.prepared()
    assert os.read(reading, 16) == b"go\n"
    os.kill(agent.host_pid(), getattr(signal, f"SIG{signo}"))
    assert agent.exited() == (5, 0, 0)
    os.close(reading)


def test_sigterm_without_a_job_ends_the_agent(agent: Agent) -> None:
    """An agent that waits for its first order can be stopped."""
    os.kill(agent.host_pid(), signal.SIGTERM)
    assert agent.wait() == 143


def test_deadline_kills_everything(agent: Agent) -> None:
    """At the deadline the main job and all it started are killed, and the flag says why."""
    begin = time.monotonic()
    agent.start("sh", "-c", "trap '' TERM; setsid sleep 1000 & sleep 1000", deadline_ms=300)
    agent.prepared()
    assert agent.exited() == (137, 9, TIMED_OUT)
    assert agent.wait() == 137
    assert 0.25 < time.monotonic() - begin < 2


def test_deadline_counts_from_go(agent: Agent) -> None:
    """Time at the gate is not the job's."""
    agent.start("sleep", "0.1", flags=HOLD, deadline_ms=400)
    agent.prepared()
    time.sleep(0.5)
    agent.send(encode_go())
    assert agent.exited() == (0, 0, 0)


def test_shutdown(agent: Agent) -> None:
    """SHUTDOWN kills all; the end is reported on every connection."""
    agent.busy()
    second = agent.exec()
    second.start("sleep", "1000")
    second.prepared()
    agent.exec().send(encode_shutdown())
    assert second.exited() == (137, 9, 0)
    assert agent.exited() == (137, 9, 0)
    assert agent.wait() == 137


def test_launcher_gone(agent: Agent) -> None:
    """A launcher that is gone takes the job that is not detached with it."""
    agent.start("sh", "-c", "trap '' TERM HUP; setsid sleep 1000 & sleep 1000")
    agent.prepared()
    agent.connection.close()
    assert agent.wait() == 137


def test_no_order_ever(agent: Agent) -> None:
    """Without START the end of the control connection is the end."""
    agent.connection.close()
    assert agent.wait() == 0


def test_launcher_that_does_not_read(agent: Agent) -> None:
    """A stopped launcher does not keep a sandbox that is over."""
    agent.start("true")
    assert agent.wait() == 0
    agent.prepared()
    assert agent.exited() == (0, 0, 0)


# Detached jobs


def test_detached_log(agent: Agent, log: tuple[int, Path]) -> None:
    """A detached job outlives the launcher; its log has both streams with the time, and how it ended."""
    before = time.time_ns()
    agent.start(
        "sh", "-c", "cat; sleep 0.1; echo out; sleep 0.1; echo err >&2; exit 3", flags=DETACH, stdio=(log[0],)
    )
    agent.prepared()
    agent.connection.close()
    assert agent.wait() == 3
    *lines, (stream, end) = records(log[1])
    assert lines == [(STDOUT, b"out\n"), (STDERR, b"err\n")]
    assert stream == END
    assert protocol.decode_end(end) == (3, 0, 0, 0)
    times = [time_ns for _, time_ns, _, _ in protocol.read_log(log[1].read_bytes())]
    assert before <= times[0] <= times[1] <= times[2] <= time.time_ns()


def test_detached_output_of_a_killed_child(agent: Agent, log: tuple[int, Path]) -> None:
    """All that was written before the end is in the log, also by processes that the end killed."""
    script = """
        setsid sh -c 'head -c 60000 /dev/zero; touch $0; sleep 1000' $0 &
        while ! test -e $0; do sleep 0.01; done"""
    marker = str(log[1]) + ".done"
    agent.start("sh", "-c", script, marker, flags=DETACH, stdio=(log[0],))
    assert agent.wait() == 0
    *pieces, end = records(log[1])
    assert sum(len(payload) for _, payload in pieces) == 60000
    assert end[0] == END


@pytest.mark.parametrize("limit", [1, 16, 17, 1000, 100_000])
def test_output_limit(agent: Agent, log: tuple[int, Path], limit: int) -> None:
    """Records with their headers stay under the limit; the rest is counted; the job goes on."""
    agent.start("head", "-c", "3000000", "/dev/zero", flags=DETACH, stdio=(log[0],), output_limit_bytes=limit)
    agent.prepared()
    assert agent.exited() == (0, 0, protocol.OUTPUT_TRUNCATED)
    *pieces, (_, end) = records(log[1])
    kept = sum(len(payload) for _, payload in pieces)
    assert log[1].stat().st_size - 40 == kept + 16 * len(pieces) <= limit
    assert protocol.decode_end(end) == (0, 0, protocol.OUTPUT_TRUNCATED, 3_000_000 - kept)


def test_full_log(agents: Callable[..., Agent], log: tuple[int, Path]) -> None:
    """A log that cannot grow is cut at a record; its end is still written, and says so."""
    agent = agents("prlimit", "--fsize=50000")
    agent.ready()
    script = "for i in 1 2 3 4 5 6 7 8 9; do head -c 9000 /dev/zero; sleep 0.02; done"
    agent.start("sh", "-c", script, flags=DETACH, stdio=(log[0],))
    agent.prepared()
    assert agent.exited() == (0, 0, protocol.OUTPUT_TRUNCATED)
    *pieces, (stream, end) = records(log[1])
    assert stream == END
    kept = sum(len(payload) for _, payload in pieces)
    assert 0 < kept < 50000
    assert protocol.decode_end(end)[3] == 81000 - kept


def test_detached_terminal(agent: Agent, log: tuple[int, Path]) -> None:
    """With TTY and DETACH the agent reads the terminal into the log."""
    agent.start(
        "sh", "-c", "test -t 1 && stty size && exit 8", flags=TTY | DETACH, stdio=(log[0],), cols=90, rows=20
    )
    assert agent.expect(PREPARED)[1] == []
    assert agent.exited() == (8, 0, 0)
    *pieces, (_, end) = records(log[1])
    assert b"".join(payload for _, payload in pieces) == b"20 90\r\n"
    assert protocol.decode_end(end)[0] == 8


def test_detached_failure_is_in_the_log(agent: Agent, log: tuple[int, Path]) -> None:
    """Who reads only the log sees that the program was not found."""
    agent.start("no-such-program", flags=DETACH, stdio=(log[0],))
    assert agent.wait() == 127
    ((_, end),) = records(log[1])
    assert protocol.decode_end(end)[0] == 127


def test_log_must_be_a_file_or_a_pipe(agent: Agent) -> None:
    """Any other kind of log could block the agent: refused."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        agent.start("true", flags=DETACH, stdio=(theirs.fileno(),))
        assert agent.failed()[0] == 2
        assert agent.wait() == 125


# A pipe as log


def start_piped(agent: Agent, *argv: str, **more: object) -> int:
    """START a detached `argv` whose log is a pipe; return the pipe's other end."""
    reading, writing = os.pipe()
    agent.start(*argv, flags=DETACH, stdio=(writing,), **more)
    os.close(writing)
    agent.prepared()
    return reading


def test_log_in_a_pipe(agent: Agent) -> None:
    """Through a pipe come the same records, none larger than what a pipe takes whole."""
    with open(start_piped(agent, "sh", "-c", "seq 100000; echo err >&2; exit 3"), "rb") as pipe:
        data = pipe.read()
    assert agent.exited() == (3, 0, 0)
    *lines, (stream, end) = parsed(data)
    assert b"".join(text for kind, text in lines if kind == STDOUT) == b"".join(
        b"%d\n" % i for i in range(1, 100001)
    )
    assert [text for kind, text in lines if kind == STDERR] == [b"err\n"]
    assert max(len(text) for _, text in lines) <= select.PIPE_BUF - 16
    assert (stream, protocol.decode_end(end)) == (END, (3, 0, 0, 0))


def test_slow_reader_of_the_log(agent: Agent) -> None:
    """A full pipe makes the job wait, and nobody else: nothing is lost, spun for or kept, and the agent serves on."""
    reading = start_piped(agent, "sh", "-c", "head -c 1000000 /dev/zero; echo end >&2")
    eventually(lambda: b"head" not in b"".join(command_line(p) for p in children(agent.host_pid())[1:]))
    ticks = cpu_ticks(agent.host_pid())
    time.sleep(0.3)
    assert agent.exec().output("echo", "alive") == b"alive\n"
    assert cpu_ticks(agent.host_pid()) - ticks < 5
    with open(reading, "rb") as pipe:
        *lines, (_, end) = parsed(pipe.read())
    assert sum(len(text) for kind, text in lines if kind == STDOUT) == 1_000_000
    assert (STDERR, b"end\n") in lines
    assert protocol.decode_end(end) == (0, 0, 0, 0)
    assert agent.exited() == (0, 0, 0)


def test_no_reader_of_the_log(agent: Agent) -> None:
    """With the reader gone the job goes on to its end; what it said is lost, and said to be."""
    begin = time.monotonic()
    reading = start_piped(agent, "sh", "-c", "sleep 0.2; head -c 1000000 /dev/zero; exit 6")
    os.close(reading)
    assert agent.exited() == (6, 0, protocol.OUTPUT_TRUNCATED)
    assert agent.wait() == 6
    assert time.monotonic() - begin < 3


def test_stuck_reader_of_the_log(agent: Agent) -> None:
    """A reader that never reads does not keep a job that is over for longer than its end may take."""
    reading = start_piped(agent, "sh", "-c", "head -c 1000000 /dev/zero", deadline_ms=300)
    begin = time.monotonic()
    assert agent.exited() == (137, 9, TIMED_OUT | protocol.OUTPUT_TRUNCATED)
    assert time.monotonic() - begin < 5
    os.close(reading)


@pytest.mark.parametrize("limit", [1, 17, 1000, 100_000])
def test_output_limit_in_a_pipe(agent: Agent, limit: int) -> None:
    """The limit holds for a pipe as for a file."""
    with open(
        start_piped(agent, "head", "-c", "300000", "/dev/zero", output_limit_bytes=limit), "rb"
    ) as pipe:
        data = pipe.read()
    *pieces, (_, end) = parsed(data)
    kept = sum(len(payload) for _, payload in pieces)
    assert len(data) - 40 == kept + 16 * len(pieces) <= limit
    assert protocol.decode_end(end) == (0, 0, protocol.OUTPUT_TRUNCATED, 300_000 - kept)


# Connections


def test_exec_beside_the_main_job(agent: Agent) -> None:
    """Each connection may start a job; its end is its own."""
    agent.busy()
    for code in (0, 3):
        frames = agent.exec()
        frames.start("sh", "-c", f"exit {code}")
        frames.prepared()
        assert frames.exited() == (code, 0, 0)
        assert frames.ended()
    frames = agent.exec()
    frames.start("no-such-program", flags=HOLD)
    frames.prepared()
    frames.send(encode_go())
    assert frames.failed()[0] == 4
    timed = agent.exec()
    timed.start("sleep", "1000", deadline_ms=50)
    timed.prepared()
    assert timed.exited() == (137, 9, TIMED_OUT)
    agent.exec().send(encode_signal(signal.SIGTERM))
    assert agent.exited() == (143, 15, 0)


def test_client_gone_kills_its_session(agent: Agent) -> None:
    """A client that leaves takes all of its job's session along, and nothing else."""
    agent.busy()
    frames = agent.exec()
    frames.start("bash", "-c", "set -m; sleep 1001 & sleep 1002 | sleep 1003 & wait")
    frames.prepared()
    pid1 = agent.host_pid()

    def sleepers() -> int:
        everything = [p for c in children(pid1) for p in (c, *children(c))]
        return sum(b"sleep\x00100" in command_line(p) for p in everything)

    eventually(lambda: sleepers() == 4)
    frames.connection.close()
    eventually(lambda: sleepers() == 1)


def test_detached_exec_outlives_its_client(agent: Agent, log: tuple[int, Path]) -> None:
    """A detached exec goes on without its client, and its log ends though another process holds its pipes."""
    agent.busy()
    frames = agent.exec()
    frames.start("sh", "-c", "sleep 0.2; setsid sleep 1000 & echo done", flags=DETACH, stdio=(log[0],))
    frames.prepared()
    frames.connection.close()
    eventually(lambda: [stream for stream, _ in records(log[1])] == [STDOUT, END])


def test_many_connections(agent: Agent) -> None:
    """32 connections are served at once, those above wait until one leaves."""
    agent.busy()
    held = [agent.exec() for _ in range(32)]
    late = agent.connect()
    assert not select.select([late.sock], [], [], 0.05)[0]
    held.pop().connection.close()
    late.ready()
    assert late.output("echo", "served") == b"served\n"
    for frames in held:
        frames.connection.close()


# The feed


@pytest.fixture
def fed(agents: Callable[..., Agent]) -> tuple[Agent, socket.socket]:
    """An agent whose connections are sent to it, and where to send them."""
    agent = agents(feed=True)
    assert agent.ready() == 1
    assert agent.feed is not None
    return agent, agent.feed


def test_connections_over_the_feed(fed: tuple[Agent, socket.socket]) -> None:
    """What the door sends is served as what connects itself would be, and not before the main job is let go."""
    agent, _ = fed
    agent.start("sleep", "1000", flags=HOLD)
    agent.prepared()
    early = agent.connect()
    assert not select.select([early.sock], [], [], 0.05)[0]
    agent.send(encode_go())
    early.ready()
    held = [agent.exec() for _ in range(31)]
    late = agent.connect()
    assert not select.select([late.sock], [], [], 0.05)[0]
    held.pop().connection.close()
    late.ready()
    assert late.output("echo", "served") == b"served\n"
    agent.exec().send(encode_signal(signal.SIGTERM))
    assert agent.exited() == (143, 15, 0)


@pytest.mark.parametrize("count", [0, 2, 3, 10])
def test_what_is_no_connection_is_dropped(fed: tuple[Agent, socket.socket], count: int) -> None:
    """Bytes with no descriptor, or more than one, open nothing and stay with nobody; the next one is served."""
    agent, feed = fed
    agent.busy()
    reading, writing = os.pipe()
    for _ in range(20):
        if count:
            socket.send_fds(feed, [b"C"], [writing] * count)
        else:
            feed.send(bytes(100))
    os.close(writing)
    assert agent.exec().output("echo", "served") == b"served\n"
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_connection_that_is_none(fed: tuple[Agent, socket.socket]) -> None:
    """A descriptor that is no socket, or a socket whose other end is gone, is closed."""
    agent, feed = fed
    agent.busy()
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        socket.send_fds(feed, [b"C"], [theirs.fileno()])
    socket.send_fds(feed, [b"C"], [writing])
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert agent.exec().output("echo", "served") == b"served\n"


def test_end_of_the_feed(fed: tuple[Agent, socket.socket]) -> None:
    """Without the door nothing more connects; the main job is not disturbed, and nothing spins."""
    agent, feed = fed
    agent.start("sh", "-c", "sleep 0.5; exit 3")
    agent.prepared()
    open_one = agent.exec()
    feed.close()
    assert open_one.output("echo", "served") == b"served\n"
    assert agent.exited() == (3, 0, 0)


# Against hostile jobs


HOSTILE = """
import os, resource, signal, sys
def may(action):
    try:
        action()
    except OSError:
        return "no"
    return "yes"
victim = int(sys.argv[1])
print(may(lambda: open(f"/proc/{victim}/mem", "r+b")),
      may(lambda: os.listdir(f"/proc/{victim}/fd")),
      may(lambda: open(f"/proc/{victim}/environ", "rb")),
      may(lambda: os.readlink(f"/proc/{victim}/exe")))
"""


def test_agent_is_closed_to_its_jobs(agents: Callable[..., Agent]) -> None:
    """A job cannot open memory or descriptors of the agent, whose uid it has; of another job it can."""
    agent = agents(*AS_NOBODY)
    assert agent.ready() == 1
    agent.start("sleep", "1000")
    pid = agent.prepared()
    assert agent.exec().output("python3", "-c", HOSTILE, str(pid)) == b"yes yes yes yes\n"
    assert agent.exec().output("python3", "-c", HOSTILE, "1") == b"no no no no\n"


def test_signals_and_limits_from_inside_do_no_harm(agents: Callable[..., Agent]) -> None:
    """A job that signals the agent and takes its limits away can neither stop it nor outlast its deadline."""
    agent = agents(*AS_NOBODY)
    assert agent.ready() == 1
    script = """
        trap '' TERM USR1
        for s in KILL STOP TSTP USR1 SEGV ABRT CHLD CONT ALRM PIPE XFSZ 34 64; do kill -$s 1; done
        prlimit --pid 1 --nofile=0:0 --nproc=0:0 --fsize=0:0 --as=0:0 --data=0:0 --sigpending=0:0
        renice -n 19 -p 1; chrt --idle -p 0 1
        setsid sleep 1000 & echo done; while :; do sleep 1; done"""
    reading, writing = os.pipe()
    with open(os.devnull, "r+b") as null:
        agent.start("sh", "-c", script, stdio=(null.fileno(), writing, null.fileno()), deadline_ms=1500)
    os.close(writing)
    agent.prepared()
    with open(reading, "rb") as pipe:
        while (line := pipe.readline()) not in (b"done\n", b""):
            pass
        assert line == b"done\n"
        pid1 = agent.host_pid()
        limits = Path(f"/proc/{pid1}/limits").read_text()
        assert [line.split()[-3] for line in limits.splitlines() if line.startswith("Max open files")] == [
            "0"
        ]
        refused = agent.connect()  # no descriptor left to accept it with
        ticks = cpu_ticks(pid1)
        assert agent.exited() == (137, 9, TIMED_OUT)
    assert ticks < 20
    assert agent.wait() == 137
    assert refused.ended()


def test_gate_of_an_exec_is_closed_to_other_jobs(agents: Callable[..., Agent], tmp_path: Path) -> None:
    """A running job that signals a held one may kill it, but cannot make it go."""
    agent = agents(*AS_NOBODY)
    agent.ready()
    agent.busy()
    tmp_path.chmod(0o777)
    held = agent.exec()
    held.start("touch", str(tmp_path / "marker"), flags=HOLD)
    pid = held.prepared()
    agent.exec().output("sh", "-c", f"for s in STOP CONT CHLD WINCH URG USR1; do kill -$s {pid}; done")
    assert held.exited() == (128 + signal.SIGUSR1, signal.SIGUSR1, 0)
    assert not (tmp_path / "marker").exists()


def test_flood_of_children_does_not_hide_the_deadline(agent: Agent) -> None:
    """Orphans by the thousand do not keep the agent from its clock."""
    begin = time.monotonic()
    agent.start("sh", "-c", "while :; do (true & true & true &); done", deadline_ms=500)
    agent.prepared()
    assert agent.exited() == (137, 9, TIMED_OUT)
    assert time.monotonic() - begin < 3


# Against garbage


def broken_frames() -> dict[str, bytes]:
    good = encode_start([b"true"], [], b"/")
    return {
        "unknown type": encode(99),
        "agent's type": encode(READY, 0, bytes(8)),
        "reserved": good[:6] + b"\1\0" + good[8:],
        "unknown flag": good[:5] + b"\x10" + good[6:],
        "go with flags": encode(2, 1),
        "go before start": encode_go(),
        "too long": (4 << 20 | 1).to_bytes(4, "little") + good[4:],
        "report before start": encode_report(),
        "report with flags": encode(6, 1),
        "report with a payload": encode(6, 0, b"x"),
        "relay without a terminal": good[:5] + b"\x08" + good[6:],
        "relay of a detached job": good[:5] + b"\x0b" + good[6:],
        "no payload": encode(1),
        "signal 0": encode_signal(0),
        "signal 65": encode_signal(65),
        "resize without a job": encode_resize(1, 1),
        "argc 0": good[:28] + bytes(4) + good[32:],
        "argc huge": good[:28] + b"\xff\xff\xff\xff" + good[32:],
        "both huge": good[:28] + b"\xff\xff\xff\x7f\x01\x00\x00\x80" + good[36:],
        "envc 1": good[:32] + b"\1" + good[33:],
        "relative": good.replace(b"/\0true", b"./\0rue"),
        "no end": good[:-1] + b"x",
        "trailing": encode(1, 0, good[8:] + b"x\0"),
        "limit without log": good[:16] + b"\1" + good[17:],
    }


@pytest.mark.parametrize("name", broken_frames())
def test_broken_frame(agents: Callable[..., Agent], name: str) -> None:
    """A frame outside of the protocol closes its connection; on the control connection all ends with 125."""
    frame = broken_frames()[name]
    three = () if frame[4] != protocol.START else (0, 0, 0)
    agent, other = agents(), agents()
    agent.ready()
    other.ready()
    other.busy()
    with open(os.devnull, "r+b") as null:
        descriptors = tuple(null.fileno() for _ in three)
        second = other.exec()
        second.send(frame, descriptors)
        assert second.ended()
        assert other.exec().output("echo", "alive") == b"alive\n"
        agent.send(frame, descriptors)
    assert agent.ended()
    assert agent.wait() == 125


@pytest.mark.parametrize(
    ("flags", "count"),
    [(0, 0), (0, 2), (0, 4), (0, 50), (TTY, 1), (DETACH, 0), (DETACH, 2), (TTY | RELAY, 0), (TTY | RELAY, 2)],
)
def test_wrong_number_of_descriptors(agent: Agent, flags: int, count: int) -> None:
    """Descriptors too few or too many are a protocol error, and none of them stays open."""
    agent.busy()
    frames = agent.exec()
    reading, writing = os.pipe()
    frames.send(encode_start([b"true"], [], b"/", flags=flags), (writing,) * count)
    os.close(writing)
    assert frames.ended()
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_descriptors_without_a_header(agent: Agent) -> None:
    """Descriptors that come in the middle of a frame are closed with its connection."""
    agent.busy()
    frames = agent.exec()
    frame = encode_signal(15)
    reading, writing = os.pipe()
    frames.send(frame[:8])
    time.sleep(0.02)
    frames.send(frame[8:], (writing,))
    os.close(writing)
    assert frames.ended()
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_second_start(agent: Agent) -> None:
    """One connection, one job."""
    agent.busy()
    agent.start("true")
    agent.connection.recv()
    assert agent.wait() == 125


def mutations(seed: int) -> Iterator[bytes]:
    """Frames that are nearly right, then noise."""
    chance = random.Random(seed)
    for _ in range(chance.randrange(1, 6)):
        frame = bytearray(
            chance.choice(
                [*broken_frames().values(), encode_start([b"true"], ENV, b"/", flags=chance.randrange(16))]
            )
        )
        for _ in range(chance.randrange(4)):
            frame[chance.randrange(len(frame))] = chance.choice([0, 1, 4, 127, 255, chance.randrange(256)])
        yield bytes(frame[: chance.choice([len(frame), chance.randrange(len(frame) + 1)])])
    yield chance.randbytes(chance.randrange(200))


@pytest.mark.parametrize("seed", range(60))
def test_garbage_ends_cleanly(agents: Callable[..., Agent], seed: int) -> None:
    """Whatever arrives, the agent neither crashes nor hangs; also where it is not PID 1."""
    agent = agents(init=False)
    agent.ready()
    chance = random.Random(seed)
    with open(os.devnull, "r+b") as null, contextlib.suppress(SandboxError, OSError):
        for piece in mutations(seed):
            if piece:
                agent.send(piece, (null.fileno(),) * chance.choice([0, 0, 1, 3, 4]))
    agent.connection.close()
    assert agent.wait() in (0, 125, 126, 127, 137)


# The other modes


def test_version() -> None:
    """--version prints the version of the protocol, the same on both sides."""
    assert subprocess.check_output([binary(), "--version"]) == b"%d\n" % protocol.VERSION


def test_user_namespace() -> None:
    """--userns holds a new user namespace, whose maps the launcher can write, until its input ends."""
    with subprocess.Popen([binary(), "--userns"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.read(1) == b"R"
        assert os.readlink(f"/proc/{process.pid}/ns/user") != os.readlink("/proc/self/ns/user")
        Path(f"/proc/{process.pid}/uid_map").write_text("0 1000000 65536")
        assert Path(f"/proc/{process.pid}/uid_map").read_text().split() == ["0", "1000000", "65536"]
        process.stdin.close()
        assert process.wait(WAIT_S) == 0


def test_no_control_descriptor() -> None:
    """Without its control connection the agent does nothing."""
    assert subprocess.run([binary()], check=False).returncode == 125


def test_agent_is_small_in_memory(agent: Agent) -> None:
    """A waiting agent takes less than 200 KiB of its own, a tenth of the budget of a sandbox."""
    agent.start("sh", "-c", "exec sleep 1000", "x" * 100_000)
    agent.prepared()
    rollup = Path(f"/proc/{agent.host_pid()}/smaps_rollup").read_text().splitlines()
    private_kib = sum(int(line.split()[1]) for line in rollup if line.startswith("Private"))
    assert 0 < private_kib < 200
