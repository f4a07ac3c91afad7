"""The two profiles of our own: what they promise, compared with moby's and with the kernel's own names."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from docker_profile import docker_default, facts
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import HostError, PolicyError
from ringfence.linux import syscalls
from ringfence.plan import seccomp_calls as calls
from ringfence.plan.seccomp import seccomp_for
from ringfence.plan.seccomp_match import decide

ALLOWED, EPERM, ENOSYS = ("SCMP_ACT_ALLOW", 0), ("SCMP_ACT_ERRNO", 1), ("SCMP_ACT_ERRNO", 38)
ARCHES = ("x86_64", "aarch64")
PROFILES = ("default", "strict")
ALL_CAPS = sorted(cap for cap in facts() if cap.startswith("CAP_"))
REGISTER = st.one_of(
    st.sampled_from(
        [0, 1, 2, 10, 16, 17, 38, 39, 40, 58, 132, 0o100, 0o4755, 0o2755, 0o644, 0o20000000, 0x5412, 0x541C]
    ),
    st.integers(0, 63).map(lambda bit: 1 << bit),
    st.integers(0, (1 << 64) - 1),
)


@pytest.fixture(params=PROFILES)
def oci(request):
    return plan(request.param).oci


@cache
def plan(name, arch="x86_64", capabilities=()):
    return seccomp_for(name, arch=arch, capabilities=capabilities)


@cache
def moby(arch="x86_64", capabilities=()):
    """Moby's profile as its users get it, not reduced by us."""
    from ringfence.plan import seccomp_moby

    kept, seccomp_moby.NEVER = seccomp_moby.NEVER, frozenset()
    try:
        return seccomp_moby.read_profile(
            docker_default(), source="moby", arch=arch, capabilities=capabilities, kernel=(6, 18)
        )[0]
    finally:
        seccomp_moby.NEVER = kept


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("name", PROFILES)
def test_what_moby_denies_we_deny(name, arch):
    """Over every call that libseccomp knows or a profile names: not allowed there, not allowed here."""
    ours, theirs = plan(name, arch).oci, moby(arch)
    names = {
        *syscalls.all_names(arch),
        *(n for p in (ours, theirs) for r in p["syscalls"] for n in r["names"]),
    }
    looser = [
        call
        for call in sorted(names)
        if decide(theirs, call) != ALLOWED
        and call not in ("socket", "clone")
        and decide(ours, call) == ALLOWED
    ]
    assert looser == []
    assert len(names) > 300


@given(st.lists(REGISTER, min_size=3, max_size=3))
def test_what_moby_denies_by_argument_we_deny(args):
    """For the three calls that moby judges by arguments: ours allows no argument that moby's denies."""
    ours, theirs = plan("default").oci, moby()
    for call in ("socket", "clone", "personality"):
        if decide(theirs, call, args) != ALLOWED:
            assert decide(ours, call, args) != ALLOWED, (call, args)


@given(st.sampled_from(sorted(calls.names(calls.CONDITIONAL))), st.lists(REGISTER, min_size=6, max_size=6))
def test_no_two_rules_disagree(call, args):
    """Whatever the arguments, one outcome matches at most (or decide raises), and a denial is EPERM."""
    for name in PROFILES:
        outcome = decide(plan(name).oci, call, args)
        assert outcome in (ALLOWED, EPERM) or (call == "personality" and outcome == ENOSYS)


def test_no_rule_names_an_argument_twice(oci):
    """The runtimes would read "and" as "or"."""
    for rule in oci["syscalls"]:
        indexes = [arg["index"] for arg in rule.get("args", ())]
        assert len(indexes) == len(set(indexes)), rule


def test_no_call_has_both_kinds_of_rules(oci):
    """libseccomp forgets the conditional rules of a call that also has an unconditional one."""
    kinds = {}
    for rule in oci["syscalls"]:
        for name in rule["names"]:
            kinds.setdefault(name, []).append(bool(rule.get("args")))
    assert all(all(kind) or kind == [False] for kind in kinds.values())


@pytest.mark.parametrize("arch", ARCHES)
def test_every_name_is_judged_once_and_none_is_forgotten(arch):
    """The groups do not overlap, and every call of the kernel that does anything is in one of them."""
    groups = calls.ALLOWED + calls.CONDITIONAL + calls.NEVER + calls.DENIED + calls.ABSENT
    listed = [name for _, _, names in groups for name in names.split()]
    assert len(listed) == len(set(listed))
    # Numbers that 64-bit kernels keep reserved and answer with ENOSYS.
    empty = {
        "afs_syscall",
        "create_module",
        "epoll_ctl_old",
        "epoll_wait_old",
        "get_kernel_syms",
        "get_thread_area",
        "getpmsg",
        "putpmsg",
        "query_module",
        "security",
        "set_thread_area",
        "tuxcall",
        "vserver",
    }
    linux_6_6 = {name for name, number in syscalls.all_names(arch).items() if number <= 453}
    assert linux_6_6 - set(listed) <= empty


def test_x86_only_names_are_exactly_those():
    """The list of calls that ARM lacks agrees with libseccomp's tables."""
    x86, arm = set(syscalls.all_names("x86_64")), set(syscalls.all_names("aarch64"))
    named = {n for r in plan("default").oci["syscalls"] for n in r["names"]}
    assert named & (x86 - arm) == calls.names(calls.X86_64_ONLY) & (x86 | arm)


def test_strict_is_part_of_default():
    """Strict allows nothing that default does not, whatever the arguments."""
    everything = calls.names(calls.ALLOWED + calls.CONDITIONAL)
    assert calls.names(calls.STRICT) < everything


@pytest.mark.parametrize("arch", ARCHES)
def test_strict_lets_the_agent_work(arch):
    """Every call that agent/PROTOCOL.md lists is allowed, by the names of each architecture."""
    text = (Path(__file__).parents[2] / "agent" / "PROTOCOL.md").read_text()
    section = text.split("## System calls", 1)[1].split("### The agent's", 1)[1].split("--userns", 1)[0]
    words = set(re.findall(r"\b[a-z][a-z0-9_]+\b", section)) & syscalls.all_names(arch).keys()
    assert words > {"read", "kill", "accept4", "execve"}
    strict = plan("strict", arch).oci
    assert {call for call in words if decide(strict, call) != ALLOWED} == set()


def test_the_counts_are_those_of_the_documentation():
    """The promise "small enough to be proud of", in numbers; the lists cannot grow unnoticed."""
    counts = {
        (name, arch): (plan(name, arch).allowed, plan(name, arch).conditional, plan(name, arch).denied)
        for name in PROFILES
        for arch in ARCHES
    }
    assert counts == {
        ("default", "x86_64"): (271, 20, 70),
        ("default", "aarch64"): (238, 16, 63),
        ("strict", "x86_64"): (142, 14, 76),
        ("strict", "aarch64"): (118, 10, 69),
    }
    assert plan("default").summary == (
        "default: 271 allowed, 20 by their arguments, 70 denied with EPERM, the rest ENOSYS"
    )


@pytest.mark.parametrize("arch", ARCHES)
def test_only_the_native_abi(arch):
    """No 32-bit and no x32 sub-architecture, and no flag that weakens."""
    oci = seccomp_for("default", arch=arch).oci
    assert oci["architectures"] == ["SCMP_ARCH_" + arch.upper()]
    assert oci["flags"] == []


def test_same_input_same_bytes():
    """A plan is compared and cached by its bytes, so the order of capabilities must not show."""
    one = seccomp_for("default", arch="x86_64", capabilities=("CAP_SYS_PTRACE", "CAP_SYS_CHROOT"))
    two = seccomp_for("default", arch="x86_64", capabilities=frozenset({"CAP_SYS_CHROOT", "CAP_SYS_PTRACE"}))
    assert json.dumps(one.oci) == json.dumps(two.oci)


@pytest.mark.parametrize(
    ("call", "args", "outcome"),
    [
        ("socket", (1,), ALLOWED),
        ("socket", (2, 1, 6), ALLOWED),
        ("socket", (10, 2, 17), ALLOWED),
        ("socket", (10, 3, 58), ALLOWED),
        ("socket", (16, 3, 0), ALLOWED),
        ("socket", (16, 3, 9), EPERM),
        ("socket", (2, 1, 132), EPERM),  # SCTP
        ("socket", (2, 1, 256), EPERM),  # SMC through AF_INET
        ("socket", (2, 1, 262), EPERM),  # MPTCP
        ("socket", (38,), EPERM),
        ("socket", (1 << 32 | 38,), EPERM),
        ("socket", (1 << 32 | 16, 3, 9), EPERM),
        ("socketpair", (1,), ALLOWED),
        ("socketpair", (16,), EPERM),
        ("ioctl", (0, 0x5413), ALLOWED),
        ("ioctl", (0, 0xFFFFFFFF80045430), ALLOWED),  # TIOCGPTN as musl sends it: sign-extended
        ("ioctl", (0, 0x5412), EPERM),
        ("ioctl", (0, 0x541C), EPERM),
        (
            "ioctl",
            (0, 0x40505412),
            ALLOWED,
        ),  # SNDRV_TIMER_IOCTL_PARAMS: the same type and number, with a size
        ("ioctl", (0, 1 << 32 | 0x5412), EPERM),
        ("ioctl", (0, 0xFFFFFFFF0000541C), EPERM),
        ("clone", (0x01200011,), ALLOWED),
        ("clone", (0x3D0F00,), ALLOWED),
        ("clone", (0x11 | 0x80,), ALLOWED),
        ("clone", (0x10000000 | 17,), EPERM),
        ("clone", (1 << 32 | 0x10000000,), EPERM),
        ("clone3", (), ENOSYS),
        ("openat2", (), ENOSYS),
        ("chmod", (0, 0o1777), ALLOWED),
        ("chmod", (0, 0o4755), EPERM),
        ("fchmod", (0, 1 << 32 | 0o2755), EPERM),
        ("fchmodat", (0, 0, 0o6755), EPERM),
        ("mknodat", (0, 0, 0o104755), EPERM),
        ("openat", (0, 0, 0o102, 0o644), ALLOWED),
        ("openat", (0, 0, 0, 0o6777), ALLOWED),  # creates nothing: the register is not read
        ("openat", (0, 0, 0o102, 0o4755), EPERM),
        ("openat", (0, 0, 0o20200002, 0o2755), EPERM),
        ("open", (0, 0o101, 0o4755), EPERM),
        ("personality", (0xFFFFFFFF,), ALLOWED),
        ("personality", (0x20008,), ALLOWED),
        ("personality", (0x40000,), EPERM),
        ("personality", (0x0FC40008,), EPERM),
        ("personality", (6,), ENOSYS),  # PER_BSD
        ("personality", (1 << 32 | 0x400000,), EPERM),
        ("ptrace", (), EPERM),
        ("io_uring_setup", (), EPERM),
        ("landlock_restrict_self", (), ALLOWED),
        ("a_call_of_the_future", (), ENOSYS),
    ],
)
def test_default_decides(call, args, outcome):
    """One line for each promise of the default profile."""
    assert decide(plan("default").oci, call, args) == outcome


@pytest.mark.parametrize("capability", ALL_CAPS)
def test_a_capability_adds_no_more_than_moby_gives_for_it(capability):
    """And nothing that no sandbox gets."""
    without, given_ = plan("default"), plan("default", capabilities=(capability,))
    theirs = moby(capabilities=(capability,))
    added = {n for n in calls.names(calls.NEVER + calls.DENIED) if decide(given_.oci, n) == ALLOWED}
    assert given_.allowed - without.allowed == len(added)
    assert all(decide(theirs, name) == ALLOWED for name in added), added
    assert not added & calls.names(calls.NEVER)


def test_chroot_comes_with_its_capability():
    """The control of the test above: something is added at all."""
    oci = seccomp_for("strict", arch="x86_64", capabilities=("CAP_SYS_CHROOT",)).oci
    assert decide(oci, "chroot") == ALLOWED


def test_unknown_architecture_and_name_are_one_line():
    """Bad input is an error of ours that names the value."""
    with pytest.raises(HostError, match="riscv64"):
        seccomp_for("default", arch="riscv64")
    with pytest.raises(PolicyError, match="'paranoid'"):
        seccomp_for("paranoid", arch="x86_64")


@pytest.mark.parametrize("name", ["default", "strict"])
@pytest.mark.parametrize(
    ("call", "own", "others"),
    [
        ("setpriority", (0, 0), [(0, 1), (0, 1 << 32), (1, 0), (2, 0), (2, 1000), (1 << 32, 0)]),
        ("ioprio_set", (1, 0), [(1, 1), (2, 0), (3, 0), (0, 0)]),
        ("prlimit64", (0,), [(1,), (1 << 32,), ((1 << 32) + 1,)]),
        ("sched_setscheduler", (0,), [(1,), ((1 << 32) + 1,)]),
        ("sched_setattr", (0,), [(1,), ((1 << 32) + 1,)]),
        ("sched_setparam", (0,), [(1,), ((1 << 32) + 1,)]),
    ],
)
def test_a_job_may_set_limits_and_priorities_of_its_own_alone(name, call, own, others):
    """The agent has the job's uid: whatever names another process by pid, group or user is refused."""
    oci = plan(name).oci
    if name == "default" or call in ("setpriority", "prlimit64"):
        assert decide(oci, call, own) == ALLOWED
    for args in others:
        assert decide(oci, call, args) in (EPERM, ENOSYS)
