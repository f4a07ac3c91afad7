"""What `ringfence doctor` says of a host: one judgement for each thing a tier needs or is weakened by."""

from typing import Literal

import msgspec

from ringfence.host import machine, sentry
from ringfence.host import mechanisms as by
from ringfence.host.enforce import Tier, enforcement
from ringfence.host.facts import GvisorFacts, Host

Level = Literal["ok", "warn", "missing"]
# The linux tier cannot do without close_range(2); overlays of idmapped layers came later.
_KERNEL_NEEDED = (5, 9)
_KERNEL_WANTED = (5, 19)
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
# What the limits of every preset need; io is apart, since it matters only with a disk to write to.
_CONTROLS = ("limits.memory", "limits.cpus", "limits.pids", "limits.cpuset")
_SANDBOX_PIDS = 64  # limits.pids of the untrusted preset


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line: is `name` "ok", weaker than it could be ("warn") or "missing", what was found, what to do."""

    name: str
    level: Level
    found: str
    advice: str = ""


def checks(host: Host, tier: Tier = "linux") -> tuple[Check, ...]:
    """Return every check of `host` for `tier`; the tier can run here when none is "missing".

    The gvisor tier can do so only with `host.gvisor` filled: see `ringfence.host.gvisor`; the microvm tier only with
    `host.vmm`: see `ringfence.host.vmm`.
    """
    # The ring around a kernel of its own is a container of the linux tier, and needs what that needs.
    gvisor = _gvisor(host) if tier == "gvisor" else _optional(_gvisor(host), "gvisor")
    microvm = _microvm(host) if tier == "microvm" else _optional(_microvm(host), "microvm")
    return (*_needs(host), *gvisor, *microvm, *_weaknesses(host))


def ready(found: tuple[Check, ...]) -> bool:
    """Whether nothing that the tier needs is missing."""
    return all(check.level != "missing" for check in found)


def _needs(host: Host) -> list[Check]:
    return [
        _kernel(host),
        _caller(host),
        _runtimes(host),
        _namespaces(host),
        _cell(host, "user", "user namespaces"),
        _cell(host, "seccomp", "seccomp"),
        _cgroup(host),
        *_controls(host),
        _cell(host, "limits.swap", "limits.swap", "warn"),
        _io(host),
        _storage(host),
    ]


def _weaknesses(host: Host) -> list[Check]:
    return [
        _cell(host, "lsm", "security module", "warn"),
        _flag("overlayfs", host.overlayfs, "available", "not available", "load the module overlay"),
        _idmapped(host),
        _pids(host),
        *_sysctls(host),
        _cell(host, "host.cpu_mitigations", "CPU flaws", "warn", value="required", good="all mitigated"),
        _cell(host, "host.smt", "SMT", "warn", value="refused", good="off"),
        _cell(host, "host.ksm", "KSM", "warn", value="refused", good="off"),
    ]


def _gvisor(host: Host) -> list[Check]:
    """Say whether runsc is here, has the flags that are needed, and on which platforms it ran a program."""
    runsc, facts, lacking = host.runtimes.get("runsc"), host.gvisor, sentry.lack(host)
    if runsc is None:
        found, advice = (lacking.reason, lacking.hint) if lacking else ("", "")
        return [Check(name="runsc", level="missing", found=found, advice=advice)]
    found = f"{runsc.version_text or '?'} ({runsc.path})"
    if facts is None:
        return [
            Check(name="runsc", level="missing", found=f"{found}, not tried", advice="run ringfence doctor")
        ]
    if lacking:
        return [Check(name="runsc", level="missing", found=f"{found}: {lacking.reason}", advice=lacking.hint)]
    return [Check(name="runsc", level="ok", found=found), _platforms(facts)]


def _platforms(facts: GvisorFacts) -> Check:
    others = "".join(f"; {name}: {reason}" for name, reason in facts.reasons.items())
    found = f"{', '.join(facts.platforms)} ran a program{others}"
    if facts.platforms[0] == "ptrace":
        advice = "use a kernel on which systrap works: ptrace is several times slower"
        return Check(name="gVisor platform", level="warn", found=found, advice=advice)
    return Check(name="gVisor platform", level="ok", found=found)


def _optional(found: list[Check], tier: Tier) -> list[Check]:
    """Return the checks of a tier that was not asked about: what it misses is no fault."""
    return [
        msgspec.structs.replace(
            check, level="ok", found=f"{check.found} (only the {tier} tier needs it)", advice=""
        )
        if check.level == "missing"
        else check
        for check in found
    ]


def _microvm(host: Host) -> list[Check]:
    """Say whether QEMU can be used, whether KVM runs a guest, and that a user cannot start machines yet."""
    qemu, facts = host.runtimes.get(machine.QEMU), host.vmm
    found = f"{qemu.version_text or '?'} ({qemu.path})" if qemu else "QEMU is not installed"
    wrong = facts.reason if facts is not None else ""
    kvm = "a guest ran on it" if host.kvm == "works" else host.kvm_reason or host.kvm
    return [
        Check(
            name="QEMU",
            level="missing" if qemu is None or wrong else "ok",
            found=f"{found}: {wrong}" if wrong else found,
            advice="install the package qemu-system-x86" if qemu is None or wrong else "",
        ),
        Check(
            name="KVM",
            level="ok" if host.kvm == "works" else "missing",
            found=kvm,
            advice="" if host.kvm == "works" else "--allow-emulation goes without a hardware boundary",
        ),
        *(
            [
                Check(
                    name="microVMs",
                    level="missing",
                    found=machine.ROOT_ONLY,
                    advice="-i gvisor, or run as root",
                )
            ]
            if host.rootless
            else []
        ),
    ]


def _cell(
    host: Host, field: str, name: str, level: Level = "missing", *, value: object = None, good: str = ""
) -> Check:
    """Turn a cell of the enforceability table into a check of the given level."""
    cell = enforcement(field, "linux", host, value=value)
    if cell.enforced:
        return Check(name=name, level="ok", found=good or cell.mechanism)
    return Check(name=name, level=level, found=cell.reason, advice=cell.hint)


def _flag(name: str, good: bool, yes: str, no: str, advice: str) -> Check:
    if good:
        return Check(name=name, level="ok", found=yes)
    return Check(name=name, level="warn", found=no, advice=advice)


def _kernel(host: Host) -> Check:
    found = f"Linux {host.kernel_release} {host.arch}"
    if host.kernel < _KERNEL_NEEDED:
        return Check(name="kernel", level="missing", found=found, advice="use Linux 5.19 or newer")
    if host.kernel < _KERNEL_WANTED:
        return Check(name="kernel", level="warn", found=found, advice="use Linux 5.19 or newer")
    return Check(name="kernel", level="ok", found=found)


def _caller(host: Host) -> Check:
    who = "an ordinary user" if host.euid else "root" if host.initial_userns else "root of a user namespace"
    if host.has("CAP_SYS_RESOURCE"):
        return Check(name="caller", level="ok", found=who)
    limits = ", ".join(
        f"{name} {host.hard_limits.get(name, 0) or 'unlimited'}" for name in ("nofile", "nproc")
    )
    found = f"{who} without CAP_SYS_RESOURCE: hard limits end at {limits}"
    if host.rootless:
        return Check(name="caller", level="ok", found=found)
    return Check(
        name="caller", level="warn", found=found, advice="ask for no more, or raise them for this process"
    )


def _runtimes(host: Host) -> Check:
    known = [host.runtimes[name] for name in ("crun", "runc") if name in host.runtimes]
    if not known:
        return Check(
            name="OCI runtime", level="missing", found="no crun, no runc", advice="install the package crun"
        )
    found = ", ".join(f"{runtime.version_text or '?'} ({runtime.path})" for runtime in known)
    advice = "" if "crun" in host.runtimes else "install the package crun: it starts twice as fast"
    return Check(name="OCI runtime", level="warn" if advice else "ok", found=found, advice=advice)


def _namespaces(host: Host) -> Check:
    missing = [kind for kind in _NAMESPACES if kind not in host.namespaces]
    if missing:
        advice = "use a kernel with all namespaces"
        return Check(name="namespaces", level="missing", found=f"no {', '.join(missing)}", advice=advice)
    return Check(name="namespaces", level="ok", found=" ".join(host.namespaces))


def _cgroup(host: Host) -> Check:
    facts = host.cgroup
    lacking = by.controller_lack(host, "memory")
    if lacking:
        return Check(name="cgroup", level="missing", found=lacking.reason, advice=lacking.hint)
    found = f"{facts.version}: {' '.join(facts.controllers)}"
    if facts.delegated:
        found += f", delegated below {facts.base.rpartition('/')[0]}"
    if facts.hybrid_v2_mount:
        found += f"; crun is started without {facts.hybrid_v2_mount}, which it refuses beside v1"
    return Check(name="cgroup", level="ok", found=found)


def _controls(host: Host) -> list[Check]:
    # Without any group the line on cgroup says it all.
    return [_cell(host, field, field) for field in _CONTROLS] if host.cgroup.writable else []


def _io(host: Host) -> Check:
    read, write = (enforcement(f"limits.io.{kind}", "linux", host) for kind in ("read", "write"))
    worst = next((cell for cell in (read, write) if not cell.enforced), None)
    if worst is None:
        return Check(name="limits.io", level="ok", found=read.mechanism)
    return Check(name="limits.io", level="warn", found=f"{worst.field}: {worst.reason}", advice=worst.hint)


def _storage(host: Host) -> Check:
    if not host.state_dir or not host.run_dir:
        lacking = "state" if not host.state_dir else "run"
        variable = f"RINGFENCE_{lacking.upper()}_DIR"
        found = f"no {lacking} directory that is safely one's own"
        return Check(name="directories", level="missing", found=found, advice=f"set {variable}")
    disk = f" on {host.block.name} ({host.block.number})" if host.block else ""
    return Check(
        name="directories",
        level="ok",
        found=f"{host.state_dir} ({host.state_filesystem}{disk}), {host.run_dir}",
    )


def _idmapped(host: Host) -> Check:
    good = "available where the images are"
    bad = f"not on {host.state_filesystem or 'this file system'} with this kernel and user"
    return _flag(
        "idmapped mounts", host.idmapped_mounts, good, bad, "keep the state on ext4, xfs or btrfs, as root"
    )


def _pids(host: Host) -> Check:
    most = min(host.pid_max, host.threads_max)
    found = (
        f"pid_max {host.pid_max}, threads-max {host.threads_max}: room for {most // _SANDBOX_PIDS} sandboxes"
    )
    advice = "" if most >= 32768 else "sysctl -w kernel.pid_max=4194304"
    return Check(name="process ids", level="warn" if advice else "ok", found=found, advice=advice)


def _sysctls(host: Host) -> list[Check]:
    """Judge the switches that keep what escaped from a sandbox from learning of or reaching the kernel."""
    wanted = (
        ("kernel.unprivileged_bpf_disabled", ("1", "2"), "1"),
        ("kernel.kptr_restrict", ("1", "2"), "1"),
        ("kernel.dmesg_restrict", ("1",), "1"),
        ("kernel.perf_event_paranoid", ("2", "3", "4"), "2"),
        ("vm.unprivileged_userfaultfd", ("0",), "0"),
        ("kernel.yama.ptrace_scope", ("1", "2", "3"), "1"),
    )
    found = [
        _flag(name, value in good, value, value, f"sysctl -w {name}={best}")
        for name, good, best in wanted
        if (value := host.sysctls.get(name)) is not None
    ]
    pattern = host.sysctls.get("kernel.core_pattern", "")
    # A pipe handler runs as the host's root on data of the job, and RLIMIT_CORE 0 does not stop it: core(5).
    found.append(
        _flag(
            "kernel.core_pattern",
            not pattern.startswith("|"),
            pattern or "not readable",
            f"{pattern} is run as root on the host when a job crashes",
            "sysctl -w kernel.core_pattern=core",
        )
    )
    return found
