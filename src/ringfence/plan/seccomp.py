"""The seccomp filter of a plan: policy words in, the OCI object `linux.seccomp` out. Pure.

Every filter is for the native ABI alone: a 32-bit (int 0x80) or x32 call has other numbers and other argument
orders, so whatever was said of the native ones would not hold for it.
"""

from errno import errorcode
from typing import TYPE_CHECKING

import msgspec

from ringfence.errors import HostError, PolicyError
from ringfence.plan import seccomp_calls as calls
from ringfence.plan.seccomp_match import SCMP_ARCH, LinuxSeccomp
from ringfence.plan.seccomp_rules import ALLOW, ENOSYS, EPERM, ERRNO, LETS_PASS, conditional_rules, plain

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ringfence.plan.seccomp_match import Rule


OWN = ("default", "strict")


class SeccompPlan(msgspec.Struct, frozen=True):
    """A filter, how many calls it always allows, always denies, judges by arguments, and that in words."""

    oci: LinuxSeccomp
    allowed: int
    denied: int
    conditional: int
    summary: str


def seccomp_for(
    name: str,
    *,
    arch: str,
    capabilities: "Collection[str]" = (),
    moby: bytes | None = None,
    kernel: tuple[int, int] = (0, 0),
) -> SeccompPlan:
    """Return the filter that the policy calls `name`: "default", "strict", or a path whose bytes are `moby`.

    `arch` is "x86_64" or "aarch64"; `capabilities` are the policy's, as "CAP_X"; `kernel` is (major,
    minor), which only rules of `moby` ask for. Raises PolicyError for a profile that cannot be used,
    HostError for another architecture.
    """
    if arch not in SCMP_ARCH:
        raise HostError(
            f"no seccomp profile for architecture {arch!r}", hint=f"known: {', '.join(SCMP_ARCH)}"
        )
    if moby is not None:
        from ringfence.plan.seccomp_moby import read_profile

        profile, reduced = read_profile(
            moby, source=name, arch=arch, capabilities=capabilities, kernel=kernel
        )
        return _plan(name, profile, reduced)
    if name not in OWN:
        raise PolicyError(
            f"unknown seccomp profile {name!r}", hint=f"say {' or '.join(OWN)}, or a path to a profile"
        )
    return _plan(name, _own(name, arch, capabilities))


def ring_seccomp(arch: str, capabilities: "Collection[str]") -> LinuxSeccomp:
    """Return the filter around a kernel of its own (gVisor's sentry, a VMM): the default and what its set-up needs.

    The parts narrow it further, each with a filter of its own. Raises HostError for another architecture.
    """
    if arch not in SCMP_ARCH:
        raise HostError(
            f"no seccomp profile for architecture {arch!r}", hint=f"known: {', '.join(SCMP_ARCH)}"
        )
    return _own("default", arch, capabilities, more=calls.names(calls.RING))


def _own(name: str, arch: str, capabilities: "Collection[str]", more: "Collection[str]" = ()) -> LinuxSeccomp:
    """Put one of our profiles together; a call in none of its lists gets ENOSYS."""
    chosen = calls.names(calls.STRICT) if name == "strict" else calls.names(calls.ALLOWED + calls.CONDITIONAL)
    granted = {call for cap in capabilities for call in calls.GRANTED_BY.get(cap, "").split()} | set(more)
    judged = calls.names(calls.CONDITIONAL)
    allowed = (chosen - judged) | granted
    denied = calls.names(calls.NEVER + calls.DENIED) | (judged - chosen)
    absent = calls.names(calls.X86_64_ONLY) if arch != "x86_64" else frozenset()
    return {
        "defaultAction": ERRNO,
        "defaultErrnoRet": ENOSYS,
        "architectures": [SCMP_ARCH[arch]],
        "flags": [],  # absent would mean SPEC_ALLOW to newer runtimes: fewer mitigations
        "syscalls": [
            *plain(allowed - absent, ALLOW),
            *plain(denied - allowed - absent, ERRNO, EPERM),
            *conditional_rules((judged & chosen) - absent),
        ],
    }


def _plan(name: str, oci: LinuxSeccomp, reduced: "Collection[str]" = ()) -> SeccompPlan:
    """Count the calls of `oci`; one with argument rules and no unconditional one is judged by arguments."""
    always = [rule for rule in oci["syscalls"] if not rule.get("args")]
    allowed = _named(rule for rule in always if rule["action"] in LETS_PASS)
    denied = _named(rule for rule in always if rule["action"] not in LETS_PASS)
    judged = _named(oci["syscalls"]) - allowed - denied
    otherwise = errorcode.get(oci.get("defaultErrnoRet", 0)) or oci["defaultAction"]
    errnos = {
        errorcode.get(rule.get("errnoRet", 0), rule["action"])
        for rule in always
        if rule["action"] not in LETS_PASS
    }
    how = f" with {errnos.pop()}" if len(errnos) == 1 else ""
    taken = f"; {len(reduced)} reduced: {', '.join(sorted(reduced))}" if reduced else ""
    summary = (
        f"{name}: {len(allowed)} allowed, {len(judged)} by their arguments, {len(denied)} denied{how},"
        f" the rest {otherwise}{taken}"
    )
    return SeccompPlan(oci, len(allowed), len(denied), len(judged), summary)


def _named(rules: "Iterable[Rule]") -> set[str]:
    return {name for rule in rules for name in rule["names"]}
