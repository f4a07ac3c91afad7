"""``run -it`` through a real terminal: what the job sees of it, what reaches the job, and how it is left behind."""

import os
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import refused, remains, run
from terminals import Terminal

pytestmark = pytest.mark.requires("root", "crun", "image:base", "userns")


@pytest.fixture(autouse=True)
def nothing_of_this_test_left(home: Path) -> Iterator[None]:
    """After each test no sandbox, id range or mount of it is there, at once and without a ``gc``."""
    yield
    assert remains(home) == []


def test_the_job_has_a_terminal_of_the_same_size() -> None:
    """All three streams, 33 rows and 77 columns, and no device of the host's: /dev/pts is the sandbox's own."""
    code = "import os; print([os.isatty(fd) for fd in (0, 1, 2)], os.get_terminal_size(), os.ttyname(0))"
    terminal = Terminal("-it", "--", "python3", "-c", code)
    assert terminal.end() == 0
    assert b"[True, True, True] os.terminal_size(columns=77, lines=33) /dev/pts/0" in terminal.shown


@pytest.mark.parametrize("spelling", [["-it"], ["-ti"], ["--interactive", "--tty"], ["--interactive", "-t"]])
def test_spellings(spelling: list[str]) -> None:
    """docker's, and the long ones; -i alone is the isolation here."""
    terminal = Terminal(*spelling, "--", "sh", "-c", "test -t 0 && exit 5")
    assert terminal.end() == 5


def test_a_new_size_is_passed_on() -> None:
    """The kernel sends ringfence SIGWINCH; the job gets its own, with the size that the outer terminal has by then."""
    code = (
        "import os, signal, time\n"
        "def show(*_): print('now', *os.get_terminal_size(), flush=True)\n"
        "signal.signal(signal.SIGWINCH, show)\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)"
    )
    terminal = Terminal("-it", "--", "python3", "-c", code)
    terminal.wait_for(b"ready")
    terminal.resize(12, 140)
    terminal.wait_for(b"now 140 12")
    terminal.type(b"\x03")
    assert terminal.end() == 130


def test_control_c_is_a_key_of_the_job() -> None:
    """It interrupts what runs in the foreground there and not ringfence itself; a shell lives on."""
    terminal = Terminal("-it", "--", "sleep", "60")
    time.sleep(0.6)
    terminal.type(b"\x03")
    assert terminal.end() == 130
    terminal = Terminal("-it", "--", "sh", "-ic", "echo ready; trap 'echo caught' INT; sleep 60; exit 6")
    terminal.wait_for(b"ready")
    time.sleep(0.2)
    terminal.type(b"\x03")
    terminal.wait_for(b"caught")
    assert terminal.end() in (6, 130)


def test_keys_arrive_one_by_one_and_unchanged() -> None:
    """The outer terminal is raw meanwhile: no echo of its own, no line to be finished, Ctrl-Z and Ctrl-\\ included."""
    code = (
        "import os, sys, tty\ntty.setraw(0)\nprint('ready', end='', flush=True)\ndata = b''\n"
        "while len(data) < 5: data += os.read(0, 10)\nprint(repr(data), end='', flush=True)"
    )
    terminal = Terminal("-it", "--", "python3", "-c", code)
    terminal.wait_for(b"ready")
    for key in (b"a", b"\x1a", b"\x1c", b"\x03", b"\r"):
        terminal.type(key)
    terminal.wait_for(rb"b'a\x1a\x1c\x03\r'")
    assert terminal.end() == 0


def test_a_shell_in_it() -> None:
    """A session as people have one: a prompt, an answer, Ctrl-D, and the status of the last command."""
    terminal = Terminal("-it", "-e", "PS1=box> ", "--", "sh", "-i")
    terminal.wait_for(b"box> ")
    terminal.type(b"echo $((6*7)); tty\n")
    terminal.wait_for(b"42\r\n/dev/pts/0\r\n")
    terminal.type(b"(exit 9)\n\x04")
    assert terminal.end() == 9


@pytest.mark.parametrize("ending", ["exit", "kill", "time", "refusal"])
def test_the_terminal_is_put_back_however_it_ends(ending: str) -> None:
    """Also when the job left it raw, the time ran out, or ringfence was told to end."""
    words = ["--timeout", "1s"] if ending == "time" else []
    command = "stty raw -echo; echo ready; " + {"exit": "exit 3"}.get(ending, "sleep 60")
    if ending == "refusal":
        terminal = Terminal("-it", "--memory", "4k", "--", "true")
        assert terminal.end() == 125
        return
    terminal = Terminal("-it", *words, "--", "sh", "-c", command)
    terminal.wait_for(b"ready")
    if ending == "kill":
        terminal.process.terminate()
    assert terminal.end() == {"exit": 3, "kill": 143, "time": 124}[ending]


def test_a_terminal_for_output_alone() -> None:
    """-t without -i: the job sees a terminal; the keys stay outside and the settings are not touched."""
    terminal = Terminal("-t", "--", "sh", "-c", "test -t 0 && test -t 1 && echo ready; sleep 0.3; exit 4")
    terminal.wait_for(b"ready")
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert terminal.end() == 4


def test_a_pipe_into_a_terminal() -> None:
    """Input that is a pipe with -it: its lines are typed, and its end is Ctrl-D."""
    reader, writer = os.pipe()
    terminal = Terminal("-it", "--", "sh", "-c", "read line; echo got $line; cat; exit 8", stdin=reader)
    os.close(reader)
    os.write(writer, b"first\nrest\nunfinished")
    os.close(writer)
    assert terminal.end() == 8
    assert b"got first" in terminal.shown
    assert terminal.shown.endswith(b"unfinished")


def test_without_any_terminal_here() -> None:
    """The job still has one, of the usual size, and its output comes as a terminal makes it."""
    done = run("-t", "--", "python3", "-c", "import os; print(os.isatty(1), *os.get_terminal_size())")
    assert (done.returncode, done.stdout) == (0, b"True 80 24\r\n")


def test_a_terminal_is_not_for_programs() -> None:
    """--json has streams of its own, and a terminal has one for both."""
    refused(run("--json", "-it", "--", "true"), 2, "--json goes with neither --tty nor --detach")
