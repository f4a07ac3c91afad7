"""The filter of a job behind gVisor's kernel: the policy's, in the few words that this kernel has for one."""

import pytest
from docker_profile import allow, docker_default, document

from ringfence.plan.gvisor import guest_seccomp
from ringfence.plan.seccomp import seccomp_for
from ringfence.plan.seccomp_match import LinuxSeccomp, decide, holds

# Release 20240729, runsc/specutils/seccomp: what else a config.json has is an error, and nothing starts.
WORDS = {"SCMP_ACT_KILL", "SCMP_ACT_TRAP", "SCMP_ACT_ERRNO", "SCMP_ACT_TRACE", "SCMP_ACT_ALLOW"}
ALLOWED, DENIED, ABSENT = ("SCMP_ACT_ALLOW", 0), ("SCMP_ACT_ERRNO", 1), ("SCMP_ACT_TRACE", 0)
CALLS = "read clone clone3 mount openat2 unshare setns socket ioctl open no_such_call ptrace fchmodat2"
NEW_USER, VSOCK, TIOCSTI = 0x10000000, 40, 0x5412


def own(name: str, *capabilities: str) -> LinuxSeccomp:
    return seccomp_for(name, arch="x86_64", capabilities=capabilities).oci


def moby(profile: bytes) -> LinuxSeccomp:
    return seccomp_for("own.json", arch="x86_64", moby=profile, kernel=(6, 1)).oci


@pytest.mark.parametrize("name", ["default", "strict"])
@pytest.mark.parametrize("args", [(), (NEW_USER,), (VSOCK, 1, 0), (0, TIOCSTI)])
def test_it_says_what_the_profile_says(name: str, args: tuple[int, ...]) -> None:
    """What passes passes, what is denied is denied, and what is not there at all is as on an older kernel."""
    wanted = own(name)
    made = guest_seccomp(wanted)
    for call in CALLS.split():
        action, errno = decide(wanted, call, args)
        expected = ABSENT if errno == 38 else (action, errno)
        assert decide(made, call, args) == expected, call
    assert decide(made, "clone3") == ABSENT  # glibc goes on with clone then, and with EPERM makes no thread


def test_nobody_is_traced_whatever_the_profile_allows() -> None:
    """A tracer would get around the filter in gVisor's kernel, so that one call is denied; the rest is kept."""
    for wanted in (own("default", "CAP_SYS_PTRACE"), moby(docker_default())):
        assert decide(wanted, "ptrace") == ALLOWED
        made = guest_seccomp(wanted)
        assert decide(made, "ptrace") == DENIED
        assert decide(made, "process_vm_readv") == ALLOWED
        assert decide(made, "read") == ALLOWED
    alone = guest_seccomp(moby(document(allow(["ptrace"]))))
    assert ["ptrace"] in [rule["names"] for rule in alone["syscalls"]]
    assert decide(alone, "ptrace") == DENIED


def first(made: LinuxSeccomp, call: str, args: tuple[int, ...]) -> str:
    """Return the action of the first rule that fits, as gVisor's kernel decides."""
    for rule in made["syscalls"]:
        if call in rule["names"] and all(holds(arg, args[arg["index"]]) for arg in rule.get("args", ())):
            return rule["action"]
    return made["defaultAction"]


@pytest.mark.parametrize("wanted", [own("default"), own("strict"), moby(docker_default())])
def test_process_1_is_neither_killed_nor_stopped(wanted: LinuxSeccomp) -> None:
    """The two signals that nobody can handle are denied for the agent, whatever lies above its number; others not."""
    made = guest_seccomp(wanted)
    for call, above in (("kill", ()), ("tkill", ()), ("tgkill", (1,)), ("rt_sigqueueinfo", ())):
        usual = decide(wanted, call)[0]
        for signal in (9, 19):
            for one in (1, 1 | 1 << 32):
                assert first(made, call, (*above, one, signal)) == "SCMP_ACT_ERRNO"
            assert (first(made, call, (*above, 2, signal)) == "SCMP_ACT_ALLOW") is (usual == "SCMP_ACT_ALLOW")
    assert first(made, "kill", (1, 15)) == decide(wanted, "kill")[0]


def test_a_filter_that_kills_for_tracing_goes_on_killing() -> None:
    """A denial that is more than EPERM stays what it is."""
    killing = moby(document(allow(["read"]), {**allow(["ptrace"]), "action": "SCMP_ACT_KILL_PROCESS"}))
    assert decide(guest_seccomp(killing), "ptrace") == ("SCMP_ACT_KILL", 0)


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("SCMP_ACT_LOG", "SCMP_ACT_ALLOW"),
        ("SCMP_ACT_KILL", "SCMP_ACT_KILL"),
        ("SCMP_ACT_KILL_THREAD", "SCMP_ACT_KILL"),
        ("SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL"),
        ("SCMP_ACT_TRAP", "SCMP_ACT_TRAP"),
    ],
)
def test_words_that_gvisor_lacks(action: str, told: str) -> None:
    """Every action of a profile becomes one that runsc takes, of the same meaning."""
    wanted = moby(document({**allow(["read"]), "action": action}, allow(["write"])))
    made = guest_seccomp(wanted)
    assert decide(made, "read") == (told, 0)
    assert {rule["action"] for rule in made["syscalls"]} <= WORDS
    assert made["defaultAction"] in WORDS
    assert made["flags"] == []


@pytest.mark.parametrize("errno", [1, 13, 38])
def test_errno_of_a_profile(errno: int) -> None:
    """ENOSYS is told by the one action that means it; other numbers are left for a runsc that knows them."""
    wanted = moby(document(allow(["read"]), defaultErrnoRet=errno))
    assert decide(guest_seccomp(wanted), "write") == (ABSENT if errno == 38 else ("SCMP_ACT_ERRNO", errno))
    assert decide(wanted, "write") == ("SCMP_ACT_ERRNO", errno)  # the plan's own filter is not changed


# What one comparison costs in the sentry's program, and how much it takes: see guest_seccomp.
INSTRUCTIONS, MOST = 12, 4096


@pytest.mark.parametrize("name", ["default", "strict"])
def test_our_own_are_shortened_and_say_the_same(name: str) -> None:
    """One rule denies what of a call is not allowed, and there is room for more rules in the sentry."""
    wanted = own(name)
    long, short = guest_seccomp(wanted), guest_seccomp(wanted, own=True)
    for call in CALLS.split():
        for args in ((0,) * 6, (NEW_USER,) + (0,) * 5, (VSOCK, 1, 0, 0, 0, 0), (0, TIOCSTI, 0, 0, 0, 0)):
            before, after = first(long, call, args), first(short, call, args)
            assert (after == "SCMP_ACT_ALLOW") is (before == "SCMP_ACT_ALLOW"), (call, args)
    compared = sum(len(rule["args"]) * len(rule["names"]) for rule in short["syscalls"] if rule.get("args"))
    assert compared * INSTRUCTIONS < MOST * 0.8


@pytest.mark.parametrize("wanted", [own("default"), own("strict"), moby(docker_default())])
def test_the_sentry_signals_the_agent_for_nobody(wanted: LinuxSeccomp) -> None:
    """A descriptor must not choose its owner's signal, nor a child be the agent's with a signal of its choice."""
    made = guest_seccomp(wanted)
    assert first(made, "fcntl", (3, 10, 9, 0, 0, 0)) == "SCMP_ACT_ERRNO"  # F_SETSIG
    assert first(made, "fcntl", (3, 2, 1, 0, 0, 0)) == decide(wanted, "fcntl")[0]  # F_SETFD
    assert first(made, "clone", (0x8000 | 17, 0, 0, 0, 0, 0)) == "SCMP_ACT_ERRNO"  # CLONE_PARENT
