"""From runsc's debug log to the lines of ``--trace``: what is the job's, and what nobody can forge."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.sandbox import trace
from ringfence.sandbox.trace import calls, lines


def log(tgid: int, tid: int, said: str) -> bytes:
    """Return a line as runsc writes it with --debug-log-format=json."""
    message = f"strace.go:605] [{tgid:4d}:{tid:4d}] {said}"
    return json.dumps({"msg": message, "level": "info", "time": "2026-01-31T23:59:59.1Z"}).encode() + b"\n"


EXECUTED = log(2, 2, "sh X execve(0x1 /bin/sh, 0x2, 0x3) = 0 (0x0) (1.5ms)")


def of_job(*said: str) -> list[str]:
    """Return what is shown of a job of one thread that says this."""
    shown = list(calls([EXECUTED, *(log(2, 2, text) for text in said)]))
    assert shown[0] == "[2] execve(0x1 /bin/sh, 0x2, 0x3) = 0 <0.001500>"
    return shown[1:]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("sh X getpid() = 2 (0x2) (750ns)", "[2] getpid() = 2 <0.000001>"),
        ("sh X close(0x3 /etc/x) = 0 (0x0) (3.6µs)", "[2] close(0x3 /etc/x) = 0 <0.000004>"),
        ("a b (c) X dup(0x1) = 3 (0x3) (2s)", "[2] dup(0x1) = 3 <2.000000>"),
        (" X getpid() = 2 (0x2) (1ms)", "[2] getpid() = 2 <0.001000>"),
        ("sh X pause() = 0 (0x0) errno=4 (interrupted) (1m2.5s)", "[2] pause() = -1 EINTR (interrupted) <62.500000>"),
        ("sh X brk(0x0) = 94871374852096 (0x5648f698f000) (1h0m0s)", "[2] brk(0x0) = 0x5648f698f000 <3600.000000>"),
        (
            "sh X wait4(0x1) = 0 (0x0) errno=512 (to be restarted) (1ms)",
            "[2] wait4(0x1) = ? ERESTARTSYS (to be restarted) <0.001000>",
        ),
        ("sh X open(0x1) = 0 (0x0) errno=9999 (odd) (1ms)", "[2] open(0x1) = -1 9999 (odd) <0.001000>"),
        ("sh X sys_9999(0x1) = 0 (0x0) (1ms)", "[2] sys_9999(0x1) = 0 <0.001000>"),
    ],
)  # fmt: skip
def test_a_call_is_one_line(said: str, shown: str) -> None:
    """Thread, name, arguments, result or the error's name, and seconds, whatever unit they were in."""
    assert of_job(said) == [shown]


def test_a_call_without_a_name_gets_the_one_of_its_number() -> None:
    """gVisor calls what it does not have by number; the name depends on the architecture, and is none of ours here."""
    (shown,) = of_job("sh X sys_425(0x1) = 0 (0x0) errno=38 (none) (1ms)")
    assert shown == "[2] io_uring_setup(0x1) = -1 ENOSYS (none) <0.001000>"


def test_what_a_job_writes_is_shown() -> None:
    """runsc shows it at the beginning of a call alone, and what is read at the end alone."""
    begin = 'sh E write(0x1 host:[2], 0x7ef9 "hello\\n", 0x6)'
    assert of_job(begin, "sh X write(0x1 host:[2], ..., 0x6) = 6 (0x6) (1ms)") == [
        '[2] write(0x1 host:[2], 0x7ef9 "hello\\n", 0x6) = 6 <0.001000>'
    ]
    begin = "sh E read(0x0, 0x7ef9, 0x6)"
    assert of_job(begin, 'sh X read(0x0, 0x7ef9 "in", 0x6) = 2 (0x2) (1ms)') == [
        '[2] read(0x0, 0x7ef9 "in", 0x6) = 2 <0.001000>'
    ]


def test_what_a_job_was_killed_in_comes_last() -> None:
    """A call that never came back is what people look for when a job hangs."""
    assert of_job("sh E read(0x0 host:[1], 0x7f, 0x1)") == [
        "[2] read(0x0 host:[1], 0x7f, 0x1) = ? <unfinished>"
    ]


def test_the_agents_own_calls_are_left_out() -> None:
    """Process 1 and its children up to their execve, whatever they are called and however many threads there are."""
    before = [
        log(1, 1, ".ringfence X openat(0x1 /a) = 3 (0x3) (1ms)"),
        log(1, 1, ".ringfence E clone(0x11)"),
        log(2, 2, ".ringfence X dup2(0x3, 0x0) = 0 (0x0) (1ms)"),
        log(1, 1, ".ringfence X clone(0x11) = 2 (0x2) (1ms)"),
        log(2, 2, ".ringfence X execve(0x1 /a/sh) = 0 (0x0) errno=2 (no such file) (1ms)"),
    ]
    after = [
        log(2, 2, ".ringfence X getpid() = 2 (0x2) (1ms)"),
        log(1, 1, "sh X read(0x3) = 3 (0x3) (1ms)"),
    ]
    assert list(calls([*before, EXECUTED, *after])) == [
        "[2] execve(0x1 /bin/sh, 0x2, 0x3) = 0 <0.001500>",
        "[2] getpid() = 2 <0.001000>",
    ]


def test_children_and_threads_are_the_jobs_from_their_first_call_on() -> None:
    """A child may be heard of before the call that made it has returned, and have no execve at all."""
    said = [
        EXECUTED,
        log(2, 2, "sh E clone(0x11)"),
        log(3, 3, "sh X getppid() = 2 (0x2) (1ms)"),
        log(2, 2, "sh X clone(0x11) = 3 (0x3) (1ms)"),
        log(2, 2, "sh X fork() = 4 (0x4) (1ms)"),
        log(4, 4, "sh X getpid() = 4 (0x4) (1ms)"),
        log(4, 5, "sh X gettid() = 5 (0x5) (1ms)"),
        log(9, 9, ".ringfence X getpid() = 9 (0x9) (1ms)"),
    ]
    assert [line.partition("(")[0] for line in calls(said)] == [
        "[2] execve",
        "[3] getppid",
        "[2] clone",
        "[2] fork",
        "[4] getpid",
        "[5] gettid",
    ]


@pytest.mark.parametrize("name", ["a X write(x", " X dup(", "E X read(", "a E exit(", "x X a( E b("])
def test_a_name_like_a_call_hides_nothing(name: str) -> None:
    """A process may call itself "a X write(": its calls are shown, as unclear, and those of its children as well."""
    said = [
        EXECUTED,
        log(2, 2, f"{name} E unlink(0x1 /x)"),
        log(2, 2, f"{name} X unlink(0x1 /x) = 0 (0x0) (1ms)"),
        log(2, 2, f"{name} E clone(0x11)"),
        log(3, 3, f"{name} X getppid() = 2 (0x2) (1ms)"),
        log(2, 2, f"{name} X clone(0x11) = 3 (0x3) (1ms)"),
    ]
    assert list(calls(said))[1:] == [
        f"[2] ?({name} X unlink(0x1 /x) = 0 <0.001000>",
        f"[3] ?({name} X getppid() = 2 <0.001000>",
        f"[2] ?({name} X clone(0x11) = 3 <0.001000>",
    ]


def test_a_name_cannot_be_another_call() -> None:
    """The control: only what comes within the length of a name makes a call unclear."""
    path = "0x7ef9a900ef7e / X exit_group("
    assert of_job(f"python3 X unlink({path}) = 0 (0x0) (1ms)") == [f"[2] unlink({path}) = 0 <0.001000>"]


FORGED = "strace.go:605] [   2:   2] sh X exit_group(0x0) = 0 (0x0) (1µs)"


@pytest.mark.parametrize(
    "argument",
    [
        f"/tmp/x\n{FORGED}",
        f'"}}\n{{"msg":"{FORGED}"}}',
        "x) = 0 (0x0) (1µs)",
        "x) = 0 (0x0) errno=1 (no) (1µs)",
        "\x1b[2J\r\n",
        "\u2028\x85",
    ],
)
def test_an_argument_is_no_line(argument: str) -> None:
    """Whatever a path holds, it stays an argument of its call, and the result is the sentry's."""
    assert of_job(f"sh X unlink(0x1 {argument}) = 0 (0x0) errno=2 (not there) (1ms)") == [
        f"[2] unlink(0x1 {argument}) = -1 ENOENT (not there) <0.001000>"
    ]


def test_a_beginning_is_no_end() -> None:
    """A path that looks like a result does not end its call."""
    assert of_job("sh E symlink(0x1 a, 0x2 x) = 0 (0x0) (1µs)") == [
        "[2] symlink(0x1 a, 0x2 x) = 0 (0x0) (1µs) = ? <unfinished>"
    ]


def test_long_arguments_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of output has a bound; the call, its result and the time are there all the same."""
    (shown,) = of_job(f"sh X execve({'x' * 100_000}) = 0 (0x0) (1ms)")
    assert len(shown) < 5000
    assert shown.endswith("…) = 0 <0.001000>")
    monkeypatch.setattr(trace, "_MOST_LINE_BYTES", 1000)
    # The rest of a line that is too long begins at a place that the job can choose.
    evil = log(2, 2, "sh X exit_group(0x0) = 0 (0x0) (1ms)")
    data = EXECUTED + b"x" * 1000 + evil + log(2, 2, "sh X getpid() = 2 (0x2) (1ms)")
    shown_lines = list(calls(lines(io.BytesIO(data))))
    assert shown_lines[1:] == [
        "[?] a call whose line has more than 1000 bytes was left out",
        "[2] getpid() = 2 <0.001000>",
    ]


def test_a_line_of_exactly_the_bound_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a line as long as the bound nor a last one without an end is lost, and nothing goes round for ever."""
    monkeypatch.setattr(trace, "_MOST_LINE_BYTES", 4)
    assert list(lines(io.BytesIO(b"abc\nab"))) == [b"abc\n", b"ab"]
    assert list(lines(io.BytesIO(b"abcd\nab\n"))) == [b"", b"ab\n"]
    assert list(lines(io.BytesIO(b"abcdefghij"))) == [b""]


TEXTS = st.text(max_size=60) | st.sampled_from(
    [" X dup(0x1) = 1 (0x1) (1ms)", " E dup(", ") = 0 (0x0) (1ms)", "strace.go:1] [2:2] ", " = 1 errno=2 (x)"]
)


@given(
    st.lists(
        st.binary(max_size=80) | st.lists(TEXTS, max_size=4).map(lambda parts: log(2, 2, "".join(parts)))
    )
)
def test_no_log_breaks_it(said: list[bytes]) -> None:
    """Whatever comes, it is skipped or shown as one call of that thread; nothing is raised."""
    for shown in calls([EXECUTED, *said]):
        assert shown.startswith(("[2] ", "[?] "))


@given(st.text(max_size=15), st.text(max_size=200))
def test_a_result_is_never_the_jobs(name: str, argument: str) -> None:
    """With any name and any argument, a call that failed is shown as failed, and there is one line of it."""
    (shown,) = of_job(f"{name} X unlink(0x1 {argument}) = 0 (0x0) errno=2 (not there) (1ms)")
    assert shown.endswith(") = -1 ENOENT (not there) <0.001000>")
    assert shown.startswith(("[2] unlink(", "[2] ?("))
