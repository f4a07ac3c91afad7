"""The filter that a microVM's agent is given: what our own code has libseccomp make of each profile.

That libseccomp's programs decide as the rules say is shown by test_seccomp_compiled.py; here our call of it is.
"""

import platform
from collections.abc import Mapping

import pytest
from docker_profile import docker_default

from ringfence.errors import PolicyError
from ringfence.linux import syscalls
from ringfence.linux.filters import compile_filter
from ringfence.plan.seccomp import seccomp_for
from ringfence.plan.seccomp_match import decide
from ringfence.proof.bpf import answer, read_program

ARCH = platform.machine()
ALLOW, ERRNO, TRAP, LOG, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x00030000, 0x7FFC0000, 0x80000000
KILLS = (0, KILL_PROCESS)
IOCTL, TIOCSTI = "ioctl", 0x5412

pytestmark = pytest.mark.skipif(ARCH not in syscalls.AUDIT_ARCH, reason=f"no profile for {ARCH}")


def asked(oci: Mapping[str, object], name: str, *args: int, arch: int | None = None) -> int:
    """Return what the compiled filter answers to one call."""
    number = syscalls.number_of(name, ARCH)
    assert number is not None
    return answer(read_program(compile_filter(oci)), number, arch or syscalls.AUDIT_ARCH[ARCH], args)


def rule(
    action: str, *names: str, args: list[dict[str, object]] | None = None, **more: object
) -> dict[str, object]:
    return {"names": list(names), "action": f"SCMP_ACT_{action}", **({"args": args} if args else {}), **more}


def profile(default: str, *rules: dict[str, object], **more: object) -> dict[str, object]:
    return {"defaultAction": f"SCMP_ACT_{default}", "architectures": [], "syscalls": list(rules), **more}


@pytest.mark.parametrize("name", ["default", "strict", "docker"])
def test_every_call_of_every_profile(name: str) -> None:
    """Whatever number a call has, the filter answers as the rules decide; foreign ABIs are killed."""
    oci = seccomp_for(name, arch=ARCH, moby=docker_default() if name == "docker" else None, kernel=(6, 1)).oci
    program = read_program(compile_filter(oci))
    native = syscalls.AUDIT_ARCH[ARCH]
    denied = 0
    for number in range(1024):
        action, errno = decide(oci, syscalls.name_of(number, ARCH) or "unknown", (0,) * 6)
        wanted = ALLOW if action == "SCMP_ACT_ALLOW" else ERRNO | (1 if errno is None else errno)
        assert answer(program, number, native, (0,) * 6) == wanted, number
        denied += wanted != ALLOW
    assert denied > 500  # no filter that lets everything through
    assert answer(program, 20, 0x40000003, ()) in KILLS  # AUDIT_ARCH_I386
    if ARCH == "x86_64":
        assert answer(program, 0x40000000 | 39, native, ()) in KILLS  # x32


def test_each_action_is_the_kernels_own() -> None:
    """Errno with its number or EPERM, trap, log, death of the process or the thread."""
    oci = profile(
        "ALLOW",
        rule("ERRNO", "mkdir"),
        rule("ERRNO", "rmdir", errnoRet=38),
        rule("TRAP", "link"),
        rule("LOG", "symlink"),
        rule("KILL_PROCESS", "unlink"),
        rule("KILL", "chmod"),
        rule("KILL_THREAD", "chown"),
    )
    answers = [
        asked(oci, name) for name in ("mkdir", "rmdir", "link", "symlink", "unlink", "chmod", "chown", "read")
    ]
    assert answers == [ERRNO | 1, ERRNO | 38, TRAP, LOG, KILL_PROCESS, 0, 0, ALLOW]


@pytest.mark.parametrize(
    ("op", "value", "more", "yes", "no"),
    [
        ("EQ", 5, {}, 5, 6),
        ("NE", 5, {}, 6, 5),
        ("LT", 5, {}, 4, 5),
        ("LE", 5, {}, 5, 6),
        ("GT", 5, {}, 6, 5),
        ("GE", 5, {}, 5, 4),
        ("MASKED_EQ", 0xF0, {"valueTwo": 0x30}, 0x31, 0x41),
        ("EQ", 1 << 40, {}, 1 << 40, 0),
    ],
)
def test_each_comparison(op: str, value: int, more: dict[str, object], yes: int, no: int) -> None:
    """An argument is compared as the profile says, all 64 bits of it, and the right one."""
    compared = {"index": 2, "value": value, "op": f"SCMP_CMP_{op}", **more}
    oci = profile("ERRNO", rule("ALLOW", "lseek", args=[compared]))
    assert asked(oci, "lseek", 0, 0, yes) == ALLOW
    assert asked(oci, "lseek", 0, 0, no) == ERRNO | 1
    assert asked(oci, "lseek", yes, yes, no) == ERRNO | 1


def test_a_rule_that_says_what_the_default_says_changes_nothing() -> None:
    """libseccomp refuses such a rule, and nobody needs it; one with another errno is another rule."""
    oci = profile("ERRNO", rule("ERRNO", "mkdir"), rule("ERRNO", "rmdir", errnoRet=38), rule("ALLOW", "read"))
    assert [asked(oci, name) for name in ("mkdir", "rmdir", "read")] == [ERRNO | 1, ERRNO | 38, ALLOW]
    assert asked({**oci, "defaultErrnoRet": 38}, "mkdir") == ERRNO | 1


def test_a_call_that_nobody_knows_is_left_out() -> None:
    """A profile for many machines names calls that this one has not; the others keep their rules."""
    oci = profile("ERRNO", rule("ALLOW", "no_such_call", "read", "sys_debug_setcontext"))
    assert asked(oci, "read") == ALLOW
    assert asked(oci, "write") == ERRNO | 1


@pytest.mark.parametrize("action", ["NOTIFY", "TRACE", "SOMETHING"])
def test_an_action_that_nobody_answers_is_refused(action: str) -> None:
    """Nobody stands ready in a guest to be asked: refused by name, as a rule's and as the default."""
    for oci in (profile("ALLOW", rule(action, "mkdir")), profile(action)):
        with pytest.raises(PolicyError, match=f"SCMP_ACT_{action}"):
            compile_filter(oci)


def test_a_profile_that_no_kernel_takes_is_refused() -> None:
    """Beyond 4,096 instructions a kernel refuses a filter, which would be the end of a start in the guest."""
    rules = [
        rule("ALLOW", IOCTL, args=[{"index": 1, "value": value << 32 | value, "op": "SCMP_CMP_EQ"}])
        for value in range(1, 2000)
    ]
    with pytest.raises(PolicyError, match="no filter that a kernel takes"):
        compile_filter(profile("ERRNO", *rules))


def test_rules_that_contradict_each_other_are_refused_or_kept() -> None:
    """A rule that libseccomp does not add is never left out in silence."""
    same = [{"index": 1, "value": TIOCSTI, "op": "SCMP_CMP_EQ"}]
    oci = profile("ERRNO", rule("ALLOW", IOCTL, args=same), rule("LOG", IOCTL, args=same))
    with pytest.raises(PolicyError, match="the seccomp rule for ioctl cannot be compiled"):
        compile_filter(oci)
