"""The cells of the enforceability table for the gvisor tier.

The job's kernel is gVisor's sentry, a process in a ring: a container of the linux tier. So a field is kept by gVisor
itself, by the ring around it, or by both, and a mechanism says which. Whether a gVisor that works is here at all is
`lack`, which is no matter of a single field.
"""

from ringfence.host.facts import Host
from ringfence.host.mechanisms import Answer, Cell, Question, namespace, seccomp, user

# The first release of which Ringfence knows that everything it passes to runsc is there.
OLDEST = "20240729"
PLATFORMS = ("kvm", "systrap", "ptrace")  # best first
_INSTALL = "install the package runsc, or choose -i linux if a shared kernel is acceptable"
# Nodes of the sentry's own /dev, which it makes without any of the host's.
_OWN_DEVICES = frozenset(f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero"))
# With one of these a process of the sentry may go over RLIMIT_NPROC, or count as another user. In a user namespace
# of its own it would have them too, which every seccomp filter of ours refuses.
_PAST_NPROC = ("CAP_SYS_ADMIN", "CAP_SYS_RESOURCE")
_ANOTHER_USER = "CAP_SETUID"


def lack(host: Host) -> Answer | None:
    """Return why no gVisor can be used here, None when one can as far as is known: before a trial that is little."""
    runsc, facts = host.runtimes.get("runsc"), host.gvisor
    if runsc is None:
        return Answer(reason="runsc is not installed", hint=_INSTALL)
    if facts is None:
        return None
    if facts.missing:
        return Answer(
            reason=f"this runsc has no {', '.join(facts.missing)}: {runsc.version_text or 'unknown version'}",
            hint=f"install runsc {OLDEST} or newer",
        )
    if not facts.platforms:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in facts.reasons.items())
        return Answer(
            reason=f"runsc runs nothing here ({reasons})", hint="run runsc by hand, or choose -i linux"
        )
    return None


def inside(mechanism: str) -> Cell:
    """Kept by gVisor's own kernel, whatever the host has."""
    return lambda _: Answer(f"gVisor itself: {mechanism}")


def around(cell: Cell, more: str = "") -> Cell:
    """Kept by the ring, as `cell` of the linux tier; `more` says what is different about it."""

    def ringed(ask: Question) -> Answer:
        answer = cell(ask)
        return answer if answer.reason else Answer(f"around gVisor: {answer.mechanism}{more}")

    return ringed


def both(mechanism: str, cell: Cell, more: str = "") -> Cell:
    """Kept twice: inside by `mechanism`, and by the ring as `cell` of the linux tier, without which it is refused."""

    def doubled(ask: Question) -> Answer:
        answer = around(cell, more)(ask)
        return answer if answer.reason else Answer(f"gVisor itself: {mechanism}; {answer.mechanism}")

    return doubled


def staged(mechanism: str) -> Cell:
    """Kept by the host's kernel in mounts made before the start, of which the gofer serves the files."""
    return around(namespace("mnt", mechanism))


USER = both("the job's user in its kernel", user)
SECCOMP = both("seccomp filter in its kernel", seccomp, " of the ring, and the sentry's own")


def network(ask: Question) -> Answer:
    """Nothing but loopback, in the sentry and around it."""
    if ask.value not in (None, "none"):
        reason = "egress rules and published ports are not built yet"
        return Answer(reason=reason, hint="network: {mode: none}")
    return both("loopback alone", namespace("net", "network namespace, only lo"))(ask)


def devices(ask: Question) -> Answer:
    """The sentry's own /dev; no device of the host is passed in."""
    listed = [str(device).partition(":")[0] for device in ask.value] if isinstance(ask.value, tuple) else []
    others = [path for path in listed if path not in _OWN_DEVICES]
    if others:
        return Answer(reason=f"{others[0]} cannot be passed into gVisor's kernel", hint="use -i linux")
    return Answer("gVisor itself: /dev of its own kernel, no device of the host")


def pids(cell: Cell) -> Cell:
    """RLIMIT_NPROC inside, for the one user that the job is; the host's own count by `cell` is a bound for the host.

    The sentry's threads count on the host and not the job's processes, so that limit alone would be another one.
    """
    doubled = both("RLIMIT_NPROC in its kernel", cell, ", sized for the sentry's own threads")
    return lambda ask: _past_nproc(ask, (*_PAST_NPROC, _ANOTHER_USER)) or doubled(ask)


def threads(ask: Question) -> Answer:
    """RLIMIT_NPROC inside, where user ids are the sandbox's own by nature."""
    return _past_nproc(ask, _PAST_NPROC) or Answer("gVisor itself: RLIMIT_NPROC in its kernel")


def _past_nproc(ask: Question, capabilities: tuple[str, ...]) -> Answer | None:
    held = next((name for name in capabilities if name in ask.capabilities), "")
    if not held:
        return None
    reason = f"in gVisor's kernel {held} is above RLIMIT_NPROC"
    return Answer(reason=reason, hint=f"drop {held}, or use -i linux")
