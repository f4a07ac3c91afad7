"""The cells of the enforceability table for the microvm tier.

The job's kernel is a Linux of its own in a virtual machine, whose VMM is a process in a ring: a container of the linux
tier. So a field is kept by the guest's kernel, by the ring around the machine, or by both, and a mechanism says which.
Whether there is a VMM, and KVM that works, is `lack`, which is no matter of a single field.
"""

from ringfence.host.facts import Host
from ringfence.host.mechanisms import Answer, Cell, Question, namespace

QEMU = "qemu-system-x86_64"
ROOT_ONLY = "only root can start a microVM yet"


def lack(host: Host) -> Answer | None:
    """Return why no machine can be made here without further words, None when one can as far as is known."""
    if host.rootless:
        return Answer(reason=ROOT_ONLY, hint="-i gvisor works for a user")
    if QEMU not in host.runtimes:
        return Answer(reason="QEMU is not installed", hint="install the package qemu-system-x86")
    if host.vmm is not None and host.vmm.reason:
        return Answer(reason=host.vmm.reason, hint="install QEMU from Debian")
    if host.kvm != "works":
        why = host.kvm_reason or f"/dev/kvm is {host.kvm}"
        return Answer(
            reason=f"KVM: {why}",
            hint="--allow-emulation goes without a hardware boundary; -i gvisor needs no KVM",
        )
    return None


def inside(mechanism: str) -> Cell:
    """Kept by the guest's kernel, whatever the host has."""
    return lambda _: Answer(f"in the guest: {mechanism}")


def around(cell: Cell, more: str = "") -> Cell:
    """Kept by the ring, as `cell` of the linux tier; `more` says what is different about it."""

    def ringed(ask: Question) -> Answer:
        answer = cell(ask)
        return answer if answer.reason else Answer(f"around the machine: {answer.mechanism}{more}")

    return ringed


def both(mechanism: str, cell: Cell, more: str = "") -> Cell:
    """Kept twice: in the guest by `mechanism`, and by the ring as `cell` of the linux tier."""

    def doubled(ask: Question) -> Answer:
        answer = around(cell, more)(ask)
        return answer if answer.reason else Answer(f"in the guest: {mechanism}; {answer.mechanism}")

    return doubled


def network(ask: Question) -> Answer:
    """No network device in the machine, and none around it."""
    if ask.value not in (None, "none"):
        return Answer(
            reason="egress rules and published ports are not built yet", hint="network: {mode: none}"
        )
    return both("no network device", namespace("net", "network namespace, only lo"))(ask)


def devices(ask: Question) -> Answer:
    """The guest's own /dev; no device of the host is passed in."""
    always = {f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero")}
    listed = [str(device).partition(":")[0] for device in ask.value] if isinstance(ask.value, tuple) else []
    others = [path for path in listed if path not in always]
    if others:
        return Answer(reason=f"{others[0]} cannot be passed into a microVM", hint="use -i linux")
    return Answer("in the guest: /dev of its own, no device of the host")


def swap(ask: Question) -> Answer:
    """A guest has no swap, so that only none of it can be promised."""
    if isinstance(ask.value, int) and ask.value > 0:
        return Answer(reason="a microVM has no swap", hint="limits.swap: 0")
    return Answer("in the guest: no swap device")
