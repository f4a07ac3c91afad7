"""What gVisor's sentry says about itself: calls that it lacks, and its last words; all of it may be a lie."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.sandbox.sentry import last_words, numbered, unsupported


def user_log(*calls: str) -> str:
    """Return what runsc of the release 20240729 writes with --user-log, one line for each call."""
    rest = "It is likely that you can safely ignore this message. Please, refer to https://gvisor.dev/c/linux/amd64/x"
    return "".join(
        json.dumps({"log": f"compat.go:120] Unsupported syscall {call}. {rest}", "level": "info"}) + "\n"
        for call in calls
    )


def test_calls_are_named_once_and_in_order() -> None:
    """Each call that failed for want of it, by name, and what every C library tries at its start is not one."""
    said = user_log("rseq(0x7e,0x20)", "mq_notify(0x1)", "vmsplice(0x1,0x2)", "mq_notify(0x2)", "clone3(0x1)")
    assert unsupported(said) == ["mq_notify", "vmsplice"]
    assert unsupported(user_log("rseq(0x7e,0x20)", "set_robust_list(0x0)")) == []


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ("sys_425(0x1,0x2)", "io_uring_setup"),
        ("sys_9999(0x1)", "number 9999"),
        ("ioctl(0x3,0x5429,0x7f)", "ioctl 0x5429"),
        ("prctl(0x35,0x0)", "prctl 0x35"),
        ("arch_prctl(0x3001,0x0)", "arch_prctl 0x3001"),
        ("setsockopt(0x3,0x1,0x3c,0x7f,0x4)", "setsockopt 0x3c"),
        ("getsockopt(0x3)", "getsockopt"),
        ("fcntl(0x3,0x408)", "fcntl 0x408"),
    ],
)
def test_a_call_with_many_uses_is_told_by_which(call: str, shown: str) -> None:
    """ "ioctl" alone says nothing: its number does; and a number that has no name in gVisor has one in Linux."""
    assert unsupported(user_log(call), "x86_64") == [shown]


def test_names_depend_on_the_machine() -> None:
    """The same number is another call elsewhere."""
    assert (numbered("sys_0", "x86_64"), numbered("sys_0", "aarch64")) == ("read", "io_setup")
    assert numbered("openat", "x86_64") == "openat"


def test_many_calls_are_counted() -> None:
    """A line that a person reads has twelve at most."""
    found = unsupported(user_log(*(f"call_{number}(0x0)" for number in range(20))))
    assert found == [*(f"call_{number}" for number in range(12)), "and 8 more"]


def test_words_of_others_are_no_calls() -> None:
    """Only the user log's own lines count: not what the sentry prints, nor broken or foreign JSON."""
    plain = "compat.go:120] Unsupported syscall mq_notify(0x1)\n"
    foreign = '{"msg": "Unsupported syscall mq_notify(0x1)"}\n{"log": 3}\n[1]\n{"log": "Unsupp\n'
    assert unsupported(plain + foreign) == []


@pytest.mark.parametrize(
    "said",
    [
        "panic: runtime error: index out of range\n\ngoroutine 1 [running]:",
        "fatal error: all goroutines are asleep",
        "SIGILL: illegal instruction\nPC=0x1",
        "runtime: out of memory",
        "[signal SIGSEGV: segmentation violation",
    ],
)
def test_last_words(said: str) -> None:
    """However Go dies, its first line is what is told, in one line of some length."""
    first = said.partition("\n")[0]
    assert last_words(user_log("rseq(0x1)") + said) == f"gVisor's kernel crashed: {first}"
    assert len(last_words(said.replace(first, first + "x" * 5000))) < 400


def test_no_last_words() -> None:
    """Who was killed said nothing, and a panic in the middle of a line is somebody's argument."""
    assert last_words("") == last_words(user_log("rseq(0x1)")) == last_words("W1 x panic: no") == ""


@given(st.text(max_size=300) | st.lists(st.text(max_size=60)).map(lambda calls: user_log(*calls)))
def test_no_words_break_it(said: str) -> None:
    """Whatever the sentry says, the answer has a bound and names are names."""
    found = unsupported(said)
    assert len(found) <= 13
    assert all(len(name) < 300 for name in found)
    assert len(last_words(said)) < 400
