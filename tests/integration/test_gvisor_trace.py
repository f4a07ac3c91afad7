"""``--trace`` at the gVisor tier: what a job really calls, in lines that it cannot forge."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import RINGFENCE, Done, refused, remains, run

pytestmark = pytest.mark.requires("root", "crun", "runsc", "image:base", "userns")

CALL = re.compile(
    rb"\[\d+\] [a-z0-9_]+\(.*\) = (-?\d+|0x[0-9a-f]+|-1 [A-Z]+ \(.*\)|\? [A-Z_]+ \(.*\)|\?) <[0-9a-z.]+>"
)


@pytest.fixture(autouse=True)
def nothing_of_this_test_left(home: Path) -> Iterator[None]:
    """After each test no sandbox, id range or mount of it is there."""
    yield
    assert remains(home) == []


def traced(*words: str, **more: object) -> Done:
    return run("-i", "gvisor", "--trace", *words, **more)


def python(code: str, *words: str) -> list[bytes]:
    """Trace a Python program that prints nothing on stderr; return the lines."""
    done = traced(*words, "--", "python3", "-I", "-S", "-c", code)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stderr.splitlines()


def test_every_line_is_one_call_and_none_is_the_agents() -> None:
    """Thread, name, arguments, result and time of each, from execve to exit; the agent's set-up is not there."""
    done = traced("--", "sh", "-c", "cat /nosuch 2> /dev/null; echo out; exit 3")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    lines = done.stderr.splitlines()
    assert [line for line in lines if not CALL.fullmatch(line)] == []
    assert lines[0].startswith(b"[2] execve(")
    assert b'["sh", "-c", "cat /nosuch 2> /dev/null; echo out; exit 3"]' in lines[0]
    assert lines[-1].startswith(b"[2] exit_group(0x3) = 0 <")
    assert any(b"/nosuch, O_RDONLY" in line and b") = -1 ENOENT (no such file" in line for line in lines)
    assert any(b'"out\\n", 0x4) = 4 <' in line for line in lines)  # what it writes is part of the arguments
    assert not any(line.startswith(b"[1]") or b"prctl(0x29" in line for line in lines)


def test_children_threads_and_those_called_like_the_agent() -> None:
    """Each of them is a task of its own, from its first call on: a name proves nothing."""
    code = (
        "import ctypes, os, _thread, time\n"
        "ctypes.CDLL(None).prctl(15, b'.ringfence', 0, 0, 0)\n"
        "os.umask(0o1)\n"
        "_thread.start_new_thread(lambda: os.umask(0o2), ())\n"
        "time.sleep(0.2)\n"
        "if os.fork() == 0:\n  os.umask(0o3)\n  os._exit(0)\n"
        "os.wait()\n"
    )
    lines = python(code)
    who = {
        mask: {line.split(b"]")[0] for line in lines if b"] umask(%s" % mask in line}
        for mask in (b"0o1", b"0x1", b"0o2", b"0x2", b"0o3", b"0x3")
    }
    tasks = [found for found in who.values() if found]
    assert len(tasks) == 3, [line for line in lines if b"umask" in line]
    assert len(set.union(*tasks)) == 3


FORGED = "strace.go:605] [   2:   2] sh X exit_group(0x0) = 0 (0x0) (1us)"


@pytest.mark.parametrize(
    "path",
    [
        f"/tmp/x\nI0131 23:59:59.1 1 {FORGED}",
        '/tmp/x"}\n{"msg":"' + FORGED + '","level":"info"}',
        "/tmp/\x1b]0;title\x07\x1b[2J\r[9] forged() = 0 <0.000001>",
        "/tmp/x) = 0 (0x0) (1us)",
    ],
)
def test_a_path_cannot_forge_a_line(path: str) -> None:
    """A newline, the log's own form, or an escape sequence in an argument is visible and is one line's."""
    lines = python(f"import os; os.path.exists({path!r}); os._exit(7 - 7)")
    assert [line for line in lines if not CALL.fullmatch(line)] == []
    assert not any(line.startswith((b"[9]", b"{", b"I0131")) for line in lines)
    assert not any(character < 32 for line in lines for character in line)
    (shown,) = (
        line for line in lines if (b"/tmp/x" in line or b"title" in line) and b"] execve(" not in line
    )
    assert b") = -1 ENOENT (" in shown
    assert sum(line.startswith(b"[2] exit_group(") for line in lines) == 1


def test_a_name_cannot_forge_or_hide_a_call() -> None:
    """A process that calls itself like a call has its calls marked as unclear; all of them are there."""
    code = "import ctypes, os\nctypes.CDLL(None).prctl(15, b' E read(', 0, 0, 0)\nos.mkdir('/tmp/made')\n"
    lines = python(code)
    (shown,) = (line for line in lines if b"/tmp/made" in line and b"execve" not in line)
    assert shown.startswith(b"[2] ?( E read( X mkdir(")
    assert re.search(rb"\) = 0 <[0-9.]+>$", shown)


def test_long_arguments_have_a_bound() -> None:
    """A megabyte of arguments is one line of some thousand bytes, and the job has all of it."""
    done = traced("--", "python3", "-I", "-S", "-c", "import sys; print(len(sys.argv[1]))", "x" * 120_000)
    assert done.stdout == b"120000\n"
    lines = done.stderr.splitlines()
    assert max(map(len, lines)) < 20_000
    assert lines[0].startswith((b"[2] execve(", b"[?] "))


def test_a_job_whose_time_is_up_shows_what_it_was_in() -> None:
    """The trace ends with the sandbox, and the call that never came back is in it."""
    done = traced("--timeout", "1s", "--", "python3", "-I", "-S", "-c", "import time; time.sleep(600)")
    assert done.returncode == 124
    lines = done.stderr.splitlines()
    assert any(b"time limit of 1 s reached" in line for line in lines)
    assert any(re.fullmatch(rb"\[2\] clock_nanosleep\(.*\) = \? .*", line) for line in lines), lines[-5:]


def test_with_a_terminal_and_with_json() -> None:
    """Lines go to stderr, whatever becomes of the job's own output."""
    done = run("-i", "gvisor", "--trace", "--json", "--", "echo", "out")
    assert json.loads(done.stdout)["stdout"] == "out\n"
    assert done.stderr.startswith(b"[2] execve(")
    done = run("-i", "gvisor", "--trace", "-t", "--", "echo", "out")
    assert (done.returncode, done.stdout) == (0, b"out\r\n")
    assert b"/dev/pts/" in done.stderr
    assert [line for line in done.stderr.splitlines() if not CALL.fullmatch(line)] == []


def test_where_there_is_no_trace() -> None:
    """Nobody would read that of a detached job, and the linux tier has none: a refusal, with what has."""
    refused(traced("-d", "--", "true"), 2, "--trace does not go with --detach")
    refused(run("-i", "linux", "--trace", "--", "true"), 2, "linux tier has no --trace", "-i gvisor has")


def test_a_command_that_is_not_there() -> None:
    """No call of the job's, so no line: only what is wrong."""
    refused(traced("--", "nosuch"), 127, "'nosuch'", "RF-COMMAND")


def test_a_reader_that_goes_away_stops_nothing() -> None:
    """``2>&1 >/dev/null | head -1``: the job runs to its end all the same, and nothing hangs."""
    script = (
        f'{RINGFENCE} run -i gvisor --trace -- sh -c "ls -R /usr/share > /dev/null; exit 5" 2>&1 | head -1; '
    )
    script += "echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.stdout.startswith(b"[2] execve(")
    assert done.stdout.splitlines()[-1] in (b"5", b"141"), done
    assert b"Traceback" not in done.stderr, done.stderr
