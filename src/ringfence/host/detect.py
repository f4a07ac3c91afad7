"""Read the facts of this host. Everything unreadable is an absence, never an exception."""

import os
import resource

from ringfence.errors import HostError
from ringfence.host.cgroups import cgroup_facts
from ringfence.host.facts import Host, IdRange, Kvm, Lsm, SubordinateIds, UserNamespaces
from ringfence.host.kernelfiles import names, number, status_field, text
from ringfence.host.runtimes import runtimes
from ringfence.host.storage import block_device, filesystem_of, idmapped
from ringfence.linux import capabilities as capability
from ringfence.linux import kvm, paths

# The names of runtime-spec rlimits in lower case without RLIMIT_.
_LIMITS = """
as core cpu data fsize locks memlock msgqueue nice nofile nproc rss rtprio rttime sigpending stack
"""
# Whatever Python does not name here has this number in asm-generic/resource.h.
_LIMIT_NUMBERS = {"locks": 10, "rttime": 15}
_SYSCTLS = (
    "kernel.core_pattern",
    "kernel.dmesg_restrict",
    "kernel.kptr_restrict",
    "kernel.perf_event_paranoid",
    "kernel.unprivileged_bpf_disabled",
    "kernel.yama.ptrace_scope",
    "vm.unprivileged_userfaultfd",
)
_SECURITY = "/sys/kernel/security"
_CPU = "/sys/devices/system/cpu"


def detect() -> Host:
    """Return what this host is, as this process sees it; takes some ten milliseconds.

    Most of that is asking the runtimes and running a guest on KVM; both have time-outs, of 5 s and of 1 s.
    """
    release = os.uname().release
    kernel = kernel_version(release)
    state = _directory(paths.state_dir)
    filesystem = filesystem_of(state)
    capabilities = _capabilities()
    virtual_machines, kvm_reason = _kvm()
    initial = text("/proc/self/uid_map").split() == ["0", "0", "4294967295"]
    return Host(
        kernel_release=release,
        kernel=kernel,
        arch=os.uname().machine,
        euid=os.geteuid(),
        initial_userns=initial,
        capabilities=capabilities,
        cpus=text(f"{_CPU}/online") or "0",
        cpu_count=os.cpu_count() or 1,
        memory_bytes=meminfo(text("/proc/meminfo"), "MemTotal"),
        swap_bytes=swap_total(text("/proc/swaps")),
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
        hard_limits=_hard_limits(),
        cgroup=cgroup_facts(),
        userns=_user_namespaces("CAP_SYS_ADMIN" in capabilities and os.geteuid() == 0),
        ids=_subordinate_ids(),
        namespaces=tuple(name for name in names("/proc/self/ns") if not name.endswith("_for_children")),
        # Only there with CONFIG_SECCOMP_FILTER: seccomp(2), "/proc interfaces".
        seccomp_filter=os.path.exists("/proc/sys/kernel/seccomp/actions_avail"),
        seccomp_actions=tuple(text("/proc/sys/kernel/seccomp/actions_avail").split()),
        lsm=_lsm(),
        overlayfs=_overlayfs(release),
        idmapped_mounts=idmapped(kernel, filesystem.kind) and "CAP_SYS_ADMIN" in capabilities and initial,
        state_filesystem=filesystem.kind,
        kvm=virtual_machines,
        kvm_reason=kvm_reason,
        runtimes=runtimes(),
        smt=_switch(f"{_CPU}/smt/active"),
        ksm=_ksm(),
        vulnerabilities={
            flaw: text(f"{_CPU}/vulnerabilities/{flaw}") for flaw in names(f"{_CPU}/vulnerabilities")
        },
        pid_max=number("/proc/sys/kernel/pid_max") or 0,
        threads_max=number("/proc/sys/kernel/threads-max") or 0,
        sysctls={name: value for name in _SYSCTLS if (value := text("/proc/sys/" + name.replace(".", "/")))},
        block=block_device(filesystem),
        boot_id=text("/proc/sys/kernel/random/boot_id"),
        state_dir=state,
        run_dir=_directory(paths.run_dir),
    )


def kernel_version(release: str) -> tuple[int, int]:
    """Return (6, 1) for "6.1.0-13-amd64"; (0, 0) when it is not understood."""
    import re

    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def meminfo(content: str, key: str) -> int:
    """Return one line of /proc/meminfo in bytes; 0 when absent."""
    for line in content.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == f"{key}:" and words[1].isdecimal():
            return int(words[1]) * 1024
    return 0


def swap_total(content: str) -> int | None:
    """Return the bytes of all swap areas in the text of /proc/swaps; None without its heading."""
    lines = content.splitlines()
    if not lines or not lines[0].startswith("Filename"):
        return None
    sizes = [line.split()[-3] for line in lines[1:] if len(line.split()) >= 5]
    return sum(int(size) * 1024 for size in sizes if size.isdecimal())


def id_ranges(content: str, user: str, uid: int) -> tuple[IdRange, ...]:
    """Return the ranges of `user` or `uid` in the text of /etc/subuid or subgid; skips bad lines."""
    found = []
    for line in content.splitlines():
        owner, _, rest = line.strip().partition(":")
        start, _, count = rest.partition(":")
        if owner in (user, str(uid)) and start.isdecimal() and count.isdecimal() and 0 < int(count) < 1 << 32:
            found.append(IdRange(int(start), int(count)))
    return tuple(found)


def namespace_permission(maximum: int, clone: int | None, apparmor: int | None, *, root: bool) -> str:
    """Return why this caller may make no user namespace, "" when it may."""
    if maximum <= 0:
        return "user.max_user_namespaces is 0"
    if root:
        return ""
    if clone == 0:
        return "kernel.unprivileged_userns_clone is 0"
    if apparmor == 1:
        return "kernel.apparmor_restrict_unprivileged_userns is 1"
    return ""


def _directory(find: object) -> str:
    try:
        return str(find()) if callable(find) else ""
    except HostError:
        return ""


def _capabilities() -> tuple[str, ...]:
    word = status_field("CapEff")
    return capability.names(int(word, 16) if word else 0)


def _hard_limits() -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for name in _LIMITS.split():
        which = getattr(resource, f"RLIMIT_{name.upper()}", _LIMIT_NUMBERS.get(name))
        if which is not None:
            hard = resource.getrlimit(which)[1]
            found[name] = None if hard == resource.RLIM_INFINITY else hard
    return found


def _user_namespaces(root: bool) -> UserNamespaces:
    maximum = number("/proc/sys/user/max_user_namespaces") or 0
    clone = number("/proc/sys/kernel/unprivileged_userns_clone")
    apparmor = number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    reason = namespace_permission(maximum, clone, apparmor, root=root)
    return UserNamespaces(
        maximum=maximum,
        unprivileged_clone=clone,
        apparmor_restricted=apparmor,
        allowed=not reason,
        reason=reason,
    )


def _subordinate_ids() -> SubordinateIds:
    import pwd

    uid = os.geteuid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return SubordinateIds(
        uids=id_ranges(text("/etc/subuid"), user, uid),
        gids=id_ranges(text("/etc/subgid"), user, uid),
        newuidmap=_privileged("newuidmap"),
        newgidmap=_privileged("newgidmap"),
    )


def _privileged(helper: str) -> str:
    """Return the path of newuidmap(1) or newgidmap(1) if it may map ids: set-uid root or a capability."""
    import stat

    path = f"/usr/bin/{helper}"
    try:
        found = os.stat(path)
        granted = bool(found.st_mode & stat.S_ISUID and found.st_uid == 0) or bool(
            os.getxattr(path, "security.capability")
        )
    except OSError:
        return ""
    return path if granted else ""


def _lsm() -> Lsm:
    loaded = text(f"{_SECURITY}/apparmor/profiles", 1 << 20).splitlines()
    return Lsm(
        active=tuple(word for word in text(f"{_SECURITY}/lsm").split(",") if word),
        apparmor=text("/sys/module/apparmor/parameters/enabled") == "Y",
        apparmor_profile=any(line.split(" (")[0] == "ringfence-default" for line in loaded),
        selinux=os.path.exists("/sys/fs/selinux/enforce"),
    )


def _overlayfs(release: str) -> bool:
    known = text("/proc/filesystems").split()
    return "overlay" in known or os.path.isdir(f"/lib/modules/{release}/kernel/fs/overlayfs")


def _kvm() -> tuple[Kvm, str]:
    """Return what KVM is here, and why it is of no use."""
    reason = kvm.probe_kvm()
    if not os.path.exists(kvm.DEVICE):
        return "absent", reason
    if not os.access(kvm.DEVICE, os.R_OK | os.W_OK):
        return "not openable", reason
    return ("unusable", reason) if reason else ("works", "")


def _switch(path: str) -> bool | None:
    value = number(path)
    return None if value is None else value == 1


def _ksm() -> bool | None:
    # A kernel without KSM has the directory of its neighbours but not this one.
    if os.path.isdir("/sys/kernel/mm") and not os.path.isdir("/sys/kernel/mm/ksm"):
        return False
    return _switch("/sys/kernel/mm/ksm/run")
