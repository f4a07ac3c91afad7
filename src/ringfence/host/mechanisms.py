"""The cells of the enforceability table for the linux tier: one small function for each mechanism."""

import os
from collections.abc import Callable

import msgspec

from ringfence.host.cpulist import cpus_of
from ringfence.host.facts import Host

DELEGATE = "run as root, or under: systemd-run --user --scope -p Delegate=yes ringfence run ..."
_V1_ROOTLESS = "run as root, or on a host with cgroup v2: v1 has no safe delegation"


_ALLOW_USERNS = "allow user namespaces with that sysctl, or run as root"
_PROFILE = "ringfence-default"
_PROFILE_FILE = f"{os.path.dirname(__file__)}/apparmor/{_PROFILE}"
_LOAD_PROFILE = (
    f"as root: install -m 644 {_PROFILE_FILE} /etc/apparmor.d/"
    f" && apparmor_parser --replace /etc/apparmor.d/{_PROFILE}"
)


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """Can `host` enforce `value` of policy `field`? A `value` of None asks about the field in general.

    `writes_to_disk` and `capabilities` are of the policy as a whole.
    """

    field: str
    host: Host
    value: object = None
    writes_to_disk: bool = True
    capabilities: tuple[str, ...] = ()


class Answer(msgspec.Struct, frozen=True):
    """Either a `mechanism`, or a `reason` why there is none and a `hint` what to do."""

    mechanism: str = ""
    reason: str = ""
    hint: str = ""


Cell = Callable[[Question], Answer]


def always(mechanism: str) -> Cell:
    """Enforced on every Linux that Ringfence runs on."""
    return lambda _: Answer(mechanism)


def never(reason: str, hint: str) -> Cell:
    """Not enforced by anything yet."""
    return lambda _: Answer(reason=reason, hint=hint)


def namespace(kind: str, mechanism: str) -> Cell:
    """Something that holds inside a namespace of this kind ("mnt", "net", "ipc")."""

    def cell(ask: Question) -> Answer:
        if kind not in ask.host.namespaces:
            return Answer(reason=f"the kernel has no {kind} namespaces", hint="use another kernel")
        if ask.host.rootless and not ask.host.userns.allowed:
            return Answer(reason=ask.host.userns.reason, hint=_ALLOW_USERNS)
        return Answer(mechanism)

    return cell


def rlimit(name: str) -> Cell:
    """A resource limit of the job's processes, up to the hard limit that this caller may set."""

    def cell(ask: Question) -> Answer:
        if isinstance(ask.value, int) and not ask.host.settable(name, ask.value):
            ceiling = ask.host.hard_limits.get(name, 0)
            return Answer(
                reason=f"RLIMIT_{name.upper()} of this process ends at {ceiling} and it may not raise it",
                hint=f"ask for at most {ceiling}, or start ringfence with a higher hard limit",
            )
        return Answer(f"rlimit {name.upper()}")

    return cell


def control(controller: str, v1_file: str, v2_file: str) -> Cell:
    """A file of a cgroup controller."""

    def cell(ask: Question) -> Answer:
        lacking = controller_lack(ask.host, controller)
        if lacking:
            return lacking
        version, file = ("v2", v2_file) if ask.host.cgroup.version == "v2" else ("v1", v1_file)
        return Answer(f"cgroup {version} {file}")

    return cell


def controller_lack(host: Host, controller: str) -> Answer | None:
    """Return why `controller` cannot be used, None when it can."""
    facts = host.cgroup
    if facts.version == "none":
        return Answer(reason="no cgroup file system is mounted", hint="mount cgroup2 on /sys/fs/cgroup")
    if not facts.writable:
        if not host.rootless:
            return Answer(
                reason=f"cgroup {facts.version} is mounted read-only",
                hint="mount -o remount,rw the file systems below /sys/fs/cgroup",
            )
        if facts.version != "v2":
            return Answer(
                reason=f"this user may not make groups in cgroup {facts.version}", hint=_V1_ROOTLESS
            )
        return Answer(reason="no cgroup is delegated to this user", hint=DELEGATE)
    if controller in facts.controllers:
        return None
    if facts.delegated:
        return Answer(reason=f"cgroup controller {controller} is not delegated to this user", hint=DELEGATE)
    return Answer(
        reason=f"the kernel offers no usable cgroup controller {controller}",
        hint=f"remove cgroup_disable= from the kernel's command line, or mount cgroup v1 with {controller}",
    )


def user(ask: Question) -> Answer:
    """A user namespace with an id range of its own."""
    host = ask.host
    if "user" not in host.namespaces or not host.userns.allowed:
        reason = host.userns.reason or "the kernel has no user namespaces"
        return Answer(reason=reason, hint=_ALLOW_USERNS)
    if not host.rootless:
        return Answer("user namespace, uid_map to a host range of its own")
    if not host.ids.uids or not host.ids.gids:
        return Answer(
            reason="this user has no range in /etc/subuid and /etc/subgid",
            hint="usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER, or run as root",
        )
    if not host.ids.newuidmap or not host.ids.newgidmap:
        return Answer(reason="newuidmap and newgidmap are missing", hint="install the package uidmap")
    return Answer("user namespace, uid_map by newuidmap to a range of /etc/subuid")


def threads(ask: Question) -> Answer:
    """RLIMIT_NPROC counts by uid: it limits the sandbox alone only when that uid is its own."""
    own = user(ask)
    if own.reason:
        return Answer(reason=f"the sandbox gets no uid of its own: {own.reason}", hint=own.hint)
    return rlimit("nproc")(ask)


def seccomp(ask: Question) -> Answer:
    """A filter installed by the runtime."""
    if ask.host.seccomp_filter:
        return Answer("seccomp filter")
    return Answer(reason="the kernel has no CONFIG_SECCOMP_FILTER", hint="use another kernel")


def lsm(ask: Question) -> Answer:
    """An AppArmor profile; there is no SELinux label yet."""
    facts = ask.host.lsm
    if facts.apparmor and facts.apparmor_profile:
        return Answer(f"AppArmor profile {_PROFILE}")
    if facts.apparmor:
        return Answer(reason=f"AppArmor is on, but the profile {_PROFILE} is not loaded", hint=_LOAD_PROFILE)
    if facts.selinux:
        return Answer(reason="Ringfence sets no SELinux label yet", hint="lsm: default goes without")
    return Answer(reason="neither AppArmor nor SELinux is active", hint="lsm: default goes without")


def network(ask: Question) -> Answer:
    """A network namespace without interfaces."""
    if ask.value not in (None, "none"):
        reason = "egress rules and published ports are not built yet"
        return Answer(reason=reason, hint="network: {mode: none}")
    return namespace("net", "network namespace, only lo")(ask)


def devices(ask: Question) -> Answer:
    """No device node but the harmless ones; the cgroup refuses whatever else would appear."""
    nodes = "minimal /dev, mounts nodev"
    if ask.host.cgroup.version == "v2" and not ask.host.rootless:
        return Answer(f"{nodes}, cgroup v2 device program")
    if controller_lack(ask.host, "devices") is None:
        return Answer(f"{nodes}, cgroup v1 devices.deny")
    return Answer(f"{nodes}, no mknod in a user namespace")


def swap(ask: Question) -> Answer:
    """Memory and swap together, or no swap to begin with."""
    lacking = controller_lack(ask.host, "memory")
    if ask.host.cgroup.swap_accounting and lacking is None:
        return control("memory", "memory.memsw.limit_in_bytes", "memory.swap.max")(ask)
    if ask.host.swap_bytes == 0:
        return Answer("the host has no swap")
    return lacking or Answer(
        reason="the kernel does not account swap to cgroups",
        hint="boot with swapaccount=1, or swapoff -a",
    )


def cpuset(ask: Question) -> Answer:
    """CPUs by number; those that are not there cannot be given."""
    if isinstance(ask.value, str):
        missing = sorted(cpus_of(ask.value) - cpus_of(ask.host.cpus))
        if missing:
            return Answer(
                reason=f"CPU {missing[0]} is not online here (online: {ask.host.cpus})",
                hint="name CPUs that are online",
            )
    return control("cpuset", "cpuset.cpus", "cpuset.cpus")(ask)


def io_read(kind: str) -> Cell:
    """Throttling of reads from the disk below the state directory; `kind` is "bps" or "iops"."""

    def cell(ask: Question) -> Answer:
        return _throttle(ask, f"blkio.throttle.read_{kind}_device", f"io.max r{kind}")

    return cell


def io_write(kind: str) -> Cell:
    """Throttling of writes, where there is anything on a disk to write to."""

    def cell(ask: Question) -> Answer:
        if not ask.writes_to_disk:
            return Answer("no writable disk-backed mount")
        found = _throttle(ask, f"blkio.throttle.write_{kind}_device", f"io.max w{kind}")
        if not found.reason and ask.host.cgroup.version != "v2":
            # Writeback is charged to the root group: cgroup-v1/blkio-controller.html, "What works".
            return Answer(
                reason="cgroup v1 throttles direct and synchronous writes only, not those of the page cache",
                hint="use a host with cgroup v2, or no rw mount",
            )
        if not found.reason:
            # The kernel charges the write-back of a page to the group that brought it into the cache.
            return Answer(f"{found.mechanism}, but of pages that another group has cached before")
        return found

    return cell


def _throttle(ask: Question, v1_file: str, v2_file: str) -> Answer:
    version_2 = ask.host.cgroup.version == "v2"
    lacking = controller_lack(ask.host, "io" if version_2 else "blkio")
    if lacking:
        return lacking
    if not ask.host.cgroup.io_throttle:
        return Answer(reason="the kernel has no CONFIG_BLK_DEV_THROTTLING", hint="use another kernel")
    if ask.host.block is None:
        return Answer(
            reason=f"the disk below {ask.host.state_dir or 'the state directory'} is not known",
            hint="keep the state on a file system on a disk (RINGFENCE_STATE_DIR)",
        )
    where = f"{ask.host.block.number} {ask.host.block.name}".strip()
    return Answer(f"cgroup {'v2' if version_2 else 'v1'} {v2_file if version_2 else v1_file} ({where})")


def smt(ask: Question) -> Answer:
    """Refused at the start when two threads share a core."""
    if ask.value == "allowed" or ask.host.smt is False:
        return Answer("checked before the start: cpu/smt/active")
    reason = "SMT is on" if ask.host.smt else "the kernel does not say whether SMT is on"
    return Answer(reason=reason, hint="boot with nosmt, or echo off > /sys/devices/system/cpu/smt/control")


def ksm(ask: Question) -> Answer:
    """Refused at the start when the kernel merges equal pages."""
    if ask.value == "allowed" or ask.host.ksm is False:
        return Answer("checked before the start: mm/ksm/run")
    reason = "KSM is on" if ask.host.ksm else "the kernel does not say whether KSM is on"
    return Answer(reason=reason, hint="echo 2 > /sys/kernel/mm/ksm/run")


def mitigations(ask: Question) -> Answer:
    """Refused at the start when the kernel says that a CPU flaw is open."""
    open_flaws = unmitigated(ask.host)
    if ask.value == "any" or (ask.host.vulnerabilities and not open_flaws):
        return Answer("checked before the start: cpu/vulnerabilities")
    reason = f"the CPU is open to {', '.join(open_flaws)}" if open_flaws else "the kernel lists no CPU flaws"
    return Answer(reason=reason, hint="update kernel and microcode, and boot without mitigations=off")


def unmitigated(host: Host) -> tuple[str, ...]:
    """Return the CPU flaws that the kernel calls vulnerable or unknown, in whole or in part."""
    return tuple(
        flaw
        for flaw, words in sorted(host.vulnerabilities.items())
        if "vulnerable" in words.lower() or words.lower().startswith("unknown") or not words
    )
