"""The microVM tier of a plan: a ring around a VMM, the machine that it makes, and what the guest's init sets up in it.

The ring is a container of the linux tier without any capability; its processes are the bridge and the VMM, and the
policy's CPU and I/O limits are those of its cgroup, whose memory is the guest's and a stated overhead. All else of the
policy is carried out by the guest's own kernel, from the setup text (agent/setup.c).
Source for QEMU's microvm machine: https://www.qemu.org/docs/master/system/i386/microvm.html
"""

import math

import msgspec

from ringfence.errors import HostError, MountError
from ringfence.host.facts import Host
from ringfence.host.machine import ROOT_ONLY
from ringfence.host.sources import Source
from ringfence.linux.capabilities import mask
from ringfence.linux.filters import compile_filter
from ringfence.plan import firecracker
from ringfence.plan.config import BY_RUN, MASKED, MASKED_SYS, NAMESPACES, READ_ONLY, kvm_mount, kvm_node
from ringfence.plan.document import Control, Disk, Machine, Op, Value
from ringfence.plan.limits import AGENT_PROCESSES, Disks, cgroup_controls, resources, rlimits
from ringfence.plan.oci import Capabilities, Mount, OciConfig
from ringfence.plan.seccomp import seccomp_for
from ringfence.plan.seccomp_match import LinuxSeccomp
from ringfence.plan.stage import AGENT, stage_controls
from ringfence.plan.workload import Workload
from ringfence.policy.model import Limits, Policy

QEMU = "qemu-system-x86_64"
MIB = 1 << 20
# What a small kernel takes for itself, and for each page of memory that it manages.
_KERNEL_BYTES, _KERNEL_SHARE = 48 * MIB, 32
_LEAST_MEMORY_BYTES = 32 * MIB
_DEFAULT_MEMORY_BYTES = 1 << 30
# QEMU itself, with its libraries and, under emulation, the translated code.
OVERHEAD_BYTES = {"kvm": 64 * MIB, "tcg": 192 * MIB}
_TRANSLATED_MIB = 64
_LEAST_CPUS = 0.05
# Threads: one for each CPU, those that wait for the disk, and the main loop.
_VMM_PROCESSES = 160
_CHANNELS = ("console", "serial link")
_RING_FILES = 512
_OF_THE_MACHINE = ("cgroup.memory_bytes", "cgroup.swap_bytes", "cgroup.pids")
# QEMU's microvm has eight places for virtio devices; one is the serial ports' and one randomness'.
_DISK_NAMES = "abcdef"
_RLIMITS = {
    "RLIMIT_FSIZE": 1,
    "RLIMIT_STACK": 3,
    "RLIMIT_CORE": 4,
    "RLIMIT_NPROC": 6,
    "RLIMIT_NOFILE": 7,
}
_RLIMIT_FIELDS = {
    "RLIMIT_CORE": "limits.core",
    "RLIMIT_FSIZE": "limits.file_size",
    "RLIMIT_NOFILE": "limits.open_files",
    "RLIMIT_NPROC": "limits.threads",
    "RLIMIT_STACK": "limits.stack",
}


def choose_accelerator(host: Host, *, emulation: bool, vmm: str = "") -> str:
    """Return "kvm", or "tcg" where KVM does not work and `emulation` was allowed; `vmm` "" is QEMU.

    Raises HostError without the VMM, and without KVM: emulation is no hardware boundary, so nobody gets it unasked.
    """
    if vmm == firecracker.NAME:
        firecracker.check_host(host, emulation=emulation)
        return "kvm"
    if host.rootless:
        raise HostError(ROOT_ONLY, hint="-i gvisor works for a user")
    facts = host.vmm
    if QEMU not in host.runtimes or facts is None:
        raise HostError(
            "QEMU is not installed", hint="apt-get install qemu-system-x86, then 'ringfence doctor'"
        )
    if facts.reason:
        raise HostError(f"QEMU cannot be used here: {facts.reason}", hint="see 'ringfence doctor'")
    if host.kvm == "works":
        return "kvm"
    why = host.kvm_reason or f"/dev/kvm is {host.kvm}"
    if not emulation:
        raise HostError(
            f"the microvm tier needs KVM, which does not work here: {why}",
            hint="--allow-emulation runs the same machine without a hardware boundary; -i gvisor needs no KVM",
        )
    return "tcg"


def check(policy: Policy, workload: Workload) -> None:
    """Refuse what a machine cannot have and no table of fields can know. Raises HostError, MountError."""
    if workload.host_files is not None:
        raise MountError(
            "the host's own files cannot be the image of a microVM", hint="--image base, or -i linux"
        )
    for source in _copied(workload):
        if source.kind in ("socket", "fifo"):
            raise MountError(
                f"the {source.kind} {source.source!r} cannot be in a microVM",
                hint="nothing is shared with a guest but copies of files; -i linux",
            )
        if source.kind == "file":
            raise MountError(
                f"the single file {source.source!r} cannot be mounted in a microVM",
                hint="mount the directory that it is in",
            )
        if not source.read_only:
            raise MountError(
                f"{source.source!r} cannot be written to from a microVM: nothing is copied back yet",
                hint="mount it read-only and bring out what is made with 'ringfence cp', or -i gvisor",
            )
        if ":" in source.target:
            raise MountError(f"the target {source.target!r} has a colon", hint="choose another for a microVM")
    memory = policy.limits.memory_bytes
    if memory is not None and memory < _LEAST_MEMORY_BYTES:
        raise HostError(
            f"{memory} bytes of memory are too little for a microVM",
            hint=f"at least {_LEAST_MEMORY_BYTES // MIB} MiB (limits.memory, --memory)",
        )
    if policy.limits.cpus is not None and policy.limits.cpus < _LEAST_CPUS:
        raise HostError(
            f"{policy.limits.cpus:g} CPUs are too little for a microVM",
            hint=f"at least {_LEAST_CPUS:g} (--cpus)",
        )


def notes(policy: Policy) -> list[str]:
    """Return warnings: what the policy allows and a microVM does not give."""
    if policy.no_new_privileges:
        return []
    return ["no_new_privileges: false has no effect: all that a microVM mounts is nosuid"]


def guest_memory_bytes(limits: Limits) -> int:
    """Return how much memory the machine has: the job's and its kernel's, in whole MiB."""
    job = limits.memory_bytes or _DEFAULT_MEMORY_BYTES
    return math.ceil((job + job // _KERNEL_SHARE + _KERNEL_BYTES) / MIB) * MIB


def machine(
    policy: Policy,
    workload: Workload,
    host: Host,
    *,
    accelerator: str,
    user: tuple[int, int],
    seccomp: LinuxSeccomp,
    ops: list[Op],
    skip: frozenset[str],
    vmm: str = "",
) -> Machine:
    """Return the machine and what is set up in it. Raises HostError without a kernel, PolicyError for a filter."""
    kernel = workload.kernel
    if kernel is None:
        raise HostError("no kernel for microVMs is here", hint="ringfence kernel fetch")
    assert host.vmm is not None  # noqa: S101 - choose_accelerator has seen to it
    program = next(iter(host.vmm.files))
    memory = guest_memory_bytes(policy.limits)
    cpus = max(1, min(host.cpu_count, math.ceil(policy.limits.cpus or 1)))
    disks = _disks(workload)
    if vmm == firecracker.NAME:
        cpus = min(cpus, firecracker.MOST_CPUS)
        line, channels = firecracker.boot_args(kernel.cmdline), firecracker.CHANNELS
        argv = firecracker.command(program)
    else:
        line, channels = f"reboot=t panic=-1 quiet console=hvc0 {kernel.cmdline}".strip(), _CHANNELS
        argv = _qemu(program, accelerator, memory, cpus, acpi=kernel.acpi, line=line, disks=len(disks))
    runtime = host.runtimes[firecracker.NAME if vmm == firecracker.NAME else QEMU]
    return {
        "vmm": vmm or "qemu",
        "program": runtime.path,
        "version": runtime.version_text,
        "accelerator": accelerator,
        "memory_bytes": memory,
        "cpus": cpus,
        "job_limits": _job_limits(policy.limits, skip),
        "kernel": kernel.name,
        "kernel_path": kernel.path,
        "kernel_digest": kernel.digest,
        "modules": list(kernel.modules),
        "command_line": line,
        "disks": disks,
        "argv": argv,
        "devices": [*channels, "rng", *(f"disk {disk['device']}" for disk in disks)],
        "setup": _setup(policy, user=user, seccomp=seccomp, ops=ops, disks=disks, skip=skip),
    }


def _copied(workload: Workload) -> list[Source]:
    """Return what is mounted of the host's files: a guest has its own devices, whatever the policy lists of these."""
    return [source for source in workload.sources if source.kind != "device"]


def _job_limits(limits: Limits, skip: frozenset[str]) -> dict[str, int]:
    wanted = {"limits.memory": limits.memory_bytes, "limits.swap": 0, "limits.pids": limits.pids}
    return {field: value for field, value in wanted.items() if value is not None and field not in skip}


def _disks(workload: Workload) -> list[Disk]:
    """The image first, then each mount, which is a copy of what it shows."""
    root: Disk = {
        "device": "vda",
        "source": workload.disk or workload.layers[0],
        "kind": "image" if workload.disk else "directory",
        "target": "/",
        "read_only": True,
    }
    found = [root]
    sources = _copied(workload)
    if len(sources) >= len(_DISK_NAMES):
        raise MountError(
            f"{len(sources)} mounts are too many for a microVM, which has {len(_DISK_NAMES) - 1} disks for them",
            hint="mount a directory around them",
        )
    for place, source in enumerate(sorted(sources, key=lambda source: source.target.count("/")), start=1):
        found.append(
            {
                "device": f"vd{_DISK_NAMES[place]}",
                "source": source.source,
                "kind": "file" if source.kind == "file" else "directory",
                "target": source.target,
                "read_only": source.read_only,
            }
        )
    return found


def _qemu(
    program: str, accelerator: str, memory: int, cpus: int, *, acpi: bool, line: str, disks: int
) -> list[str]:
    """Return QEMU's command line: a machine with what it needs and nothing else; descriptors are filled in later."""
    how = "on" if acpi else "off"
    # isa-serial and rtc are what a microvm has beside virtio; a kernel with ACPI finds its devices there.
    shape = f"microvm,acpi={how},isa-serial=off,rtc={how},auto-kernel-cmdline=on,memory-backend=ram"
    accel = "kvm" if accelerator == "kvm" else f"tcg,tb-size={_TRANSLATED_MIB},thread=multi"
    cpu = "host" if accelerator == "kvm" else "max,-tsc" if not acpi else "max"
    found = [
        program,
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", shape, "-accel", accel, "-cpu", cpu, "-smp", str(cpus), "-m", f"{memory // MIB}M"),
        *("-object", f"memory-backend-ram,id=ram,size={memory // MIB}M,share=off,merge=off,dump=off"),
        *("-kernel", "/kernel", "-initrd", "/initrd", "-append", line),
        *("-chardev", "socket,id=link,fd=@LINK@", "-add-fd", "fd=@CONSOLE@,set=99"),
        *("-chardev", "file,id=console,path=/dev/fdset/99,append=on"),
        *("-device", "virtio-serial-device,max_ports=3"),
        *("-device", "virtconsole,chardev=console", "-device", "virtserialport,chardev=link,name=link"),
        *("-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng"),
    ]
    for place in range(disks):
        found += [
            *("-add-fd", f"fd=@DISK{place}@,set={place + 1}"),
            "-blockdev",
            f"driver=file,node-name=file{place},filename=/dev/fdset/{place + 1},read-only=on,locking=off",
            *("-device", f"virtio-blk-device,drive=file{place}"),
        ]
    return [
        *found,
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    ]


def _setup(
    policy: Policy,
    *,
    user: tuple[int, int],
    seccomp: LinuxSeccomp,
    ops: list[Op],
    disks: list[Disk],
    skip: frozenset[str],
) -> list[str]:
    """Return the setup text's lines (agent/setup.c), without the host name."""
    limits = policy.limits
    upper = next((op["upper"] for op in ops if op["op"] == "overlay"), "")
    pids = "max" if limits.pids is None or "limits.pids" in skip else str(limits.pids + AGENT_PROCESSES)
    memory = "max" if limits.memory_bytes is None else str(limits.memory_bytes)
    return [
        f"uid={user[0]}",
        f"gid={user[1]}",
        f"caps={mask(policy.capabilities):x}",
        "nnp=1",
        f"seccomp={compile_filter(seccomp).hex()}",
        f"memory={memory}",
        "swap=0",
        f"pids={pids}",
        "root=vda:erofs",
        f"overlay={limits.disk_bytes}:{limits.inodes}" if upper else "overlay=ro",
        f"shm={limits.shm_bytes}:{limits.inodes}",
        f"sysfs={int(policy.filesystem.sysfs)}",
        *(
            f"rlimit={_RLIMITS[limit['type']]}:{limit['soft']}:{limit['hard']}"
            for limit in rlimits(limits, skip)
        ),
        *(f"sysctl={name}={value}" for name, value in sorted(policy.sysctls.items())),
        *_steps(ops, user),
        *_mounted(disks, limits),
        *(f"mask={path}" for path in _masked(policy)),
        *(f"readonly={path}" for path in READ_ONLY),
    ]


def _masked(policy: Policy) -> list[str]:
    """Return what is hidden at the linux tier as well: here it tells of the guest's kernel."""
    return [*MASKED, *(MASKED_SYS if policy.filesystem.sysfs else ())]


def _steps(ops: list[Op], user: tuple[int, int]) -> list[str]:
    """Return what the host would stage at the linux tier, for the guest to make of its own memory."""
    found: list[str] = []
    for op in ops:
        if op["op"] == "directory" and op["at"].startswith(("skeleton/", "root/")):
            # In the root, after the tmpfs that it lies in: a mount point.
            path = op["at"].removeprefix("skeleton").removeprefix("root")
            if not _is_kernels(path):
                uid, gid = user if op["owner"] == "job" else (0, 0)
                found.append(f"dir={path}:{op['mode']:o}:{uid}:{gid}")
        elif op["op"] == "file" and op["at"].startswith("skeleton/"):
            if _is_kernels(op["at"].removeprefix("skeleton")):
                continue  # a mount point for a device
            found.append(f"file={op['at'].removeprefix('skeleton')}:{op['mode']:o}:{op['text']}")
        elif op["op"] == "tmpfs" and op["at"].startswith("root/"):
            uid, gid = user if op["owner"] == "job" else (0, 0)
            path = op["at"].removeprefix("root")
            found.append(f"tmpfs={path}:{op['size_bytes']}:{op['inodes']}:{op['mode']:o}:{uid}:{gid}")
        elif op["op"] == "tmpfs" and op["at"] == "scratch":
            found.append(f"scratch={op['size_bytes']}:{op['inodes']}")
        elif op["op"] == "share":
            found.append(f"share={op['at']}:{user[0]}:{user[1]}")
    return found


def _is_kernels(path: str) -> bool:
    return path.split("/")[1] in ("proc", "sys", "dev") or path.startswith(AGENT)


def _mounted(disks: list[Disk], limits: Limits) -> list[str]:
    found = []
    for disk in disks:
        if disk["target"] == "/":
            continue
        # What a job changes of a copy takes its place in the limit on its files.
        way = "ro" if disk["read_only"] else f"rw:{limits.disk_bytes}:{limits.inodes}"
        found.append(f"disk={disk['device']}:erofs:{disk['target']}:{way}")
    return found


def ring_stage(host: Host, made: Machine, limits: Limits) -> list[Op]:
    """Return what the ring is made of: the bridge, the VMM's own files, the kernel; `limits` are the policy's."""
    assert host.vmm is not None  # noqa: S101 - choose_accelerator has seen to it
    ops: list[Op] = []
    if host.cgroup.hybrid_v2_mount and not host.rootless:
        ops.append({"op": "hide", "path": host.cgroup.hybrid_v2_mount})
    ops.append(
        {"op": "tmpfs", "at": ".", "size_bytes": 4 * MIB, "inodes": 1024, "mode": 0o711, "owner": "root"}
    )
    ops += [
        {"op": "directory", "at": name, "mode": 0o755, "owner": "root"} for name in ("proc", "dev", "bundle")
    ]
    ops.append({"op": "agent", "at": AGENT.removeprefix("/")})
    # Where QEMU looks for its modules and firmware depends on where it is itself.
    for path, source in host.vmm.files.items():
        ops += _shown(source, path.removeprefix("/"))
    ops += kvm_node(host, "job") if made["accelerator"] == "kvm" else []
    ops += _shown(made["kernel_path"], "kernel")
    ops.append({"op": "initrd", "at": "initrd", "modules": made["modules"]})
    if made["vmm"] == firecracker.NAME:
        ops += firecracker.ring_stage(made, limits.io)
    return ops


def _shown(source: str, at: str) -> list[Op]:
    parent = at.rpartition("/")[0]
    ops: list[Op] = [{"op": "directory", "at": parent, "mode": 0o755, "owner": "root"}] if parent else []
    ops.append({"op": "file", "at": at, "text": "", "mode": 0o644})
    ops.append(
        {
            "op": "bind",
            "source": source,
            "at": at,
            "below": "stage",
            "kind": "file",
            "ids": "none",
            "read_only": True,
        }
    )
    return ops


def ring_limits(limits: Limits, accelerator: str) -> Limits:
    """Return the limits of the ring's cgroup: the machine's memory and the VMM's, and the VMM's own threads."""
    return msgspec.structs.replace(
        limits,
        memory_bytes=guest_memory_bytes(limits) + OVERHEAD_BYTES[accelerator],
        swap_bytes=0,
        pids=_VMM_PROCESSES - AGENT_PROCESSES,
    )


def ring(
    policy: Policy,
    host: Host,
    *,
    accelerator: str,
    user: tuple[int, int],
    range_size: int,
    disks: Disks,
    skip: frozenset[str],
) -> OciConfig:
    """Return the runtime-spec object of the ring; the bridge's command line is filled in for each sandbox."""
    none: Capabilities = {"bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": []}
    devices = ("c 10:232 rw",) if accelerator == "kvm" else ()
    limited = resources(
        ring_limits(policy.limits, accelerator), host, disks=disks, skip=skip, devices=devices
    )
    # Set at the gate: until then nothing but the VMM and the guest's kernel is at work.
    limited["cpu"].pop("quota", None)
    limited["cpu"].pop("period", None)
    mapping = {"containerID": 0, "hostID": 0, "size": range_size}
    kinds = [kind for kind in NAMESPACES if not (kind == "user" and host.rootless)]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": BY_RUN, "readonly": not host.rootless},
        "process": {
            "terminal": False,
            "user": {"uid": user[0], "gid": user[1], "additionalGids": [], "umask": 0o077},
            "args": [AGENT],
            "env": [],
            "cwd": "/",
            "capabilities": none,
            "rlimits": [
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                {"type": "RLIMIT_NOFILE", "soft": _RING_FILES, "hard": _RING_FILES},
            ],
            "noNewPrivileges": True,
        },
        "hostname": BY_RUN,
        "mounts": _ring_mounts(accelerator, host),
        "linux": {
            "namespaces": [
                {"type": kind, "path": BY_RUN} if kind == "user" else {"type": kind} for kind in kinds
            ],
            "uidMappings": [] if host.rootless else [{**mapping}],  # type: ignore[typeddict-item]
            "gidMappings": [] if host.rootless else [{**mapping}],  # type: ignore[typeddict-item]
            "cgroupsPath": BY_RUN,
            "resources": limited,
            "sysctl": {},
            "seccomp": seccomp_for("default", arch=host.arch).oci,
            "rootfsPropagation": "private",
            "maskedPaths": [],
            "readonlyPaths": ["/proc/sys"],
        },
    }


def _ring_mounts(accelerator: str, host: Host) -> list[Mount]:
    mounts: list[Mount] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "noexec", "mode=755", "size=65536", "nr_inodes=64"],
        },
    ]
    if accelerator == "kvm":
        mounts.append(kvm_mount(host))
    return mounts


def controls(
    policy: Policy,
    host: Host,
    made: Machine,
    ops: list[Op],
    *,
    user: tuple[int, int],
    disks: Disks,
    limited: bool,
    skip: frozenset[str],
) -> list[Control]:
    """Return what must be seen: of the job what its guest reports, of the VMM and the bridge what the host sees."""
    rows: list[tuple[str, str, Value]] = [
        ("credentials.uid", "user", user[0]),
        ("credentials.gid", "user", user[1]),
        ("credentials.groups", "user", []),
        *(
            (f"capabilities.{kind}", "capabilities", sorted(policy.capabilities))
            for kind in ("inheritable", "permitted", "effective", "bounding", "ambient")
        ),
        ("no_new_privileges", "no_new_privileges", True),
        ("seccomp.mode", "seccomp", "filter"),
        ("seccomp.filters", "seccomp", 1),
        *(
            (
                f"rlimit.{limit['type'].removeprefix('RLIMIT_').lower()}",
                _RLIMIT_FIELDS[limit["type"]],
                limit["hard"],
            )
            for limit in rlimits(policy.limits, skip)
        ),
        ("hostname", "namespaces", None),
        ("kernel", "isolation", "own"),
        ("network.interfaces", "network.mode", ["lo"]),
        ("descriptors", "descriptors", ["0", "1", "2"]),
        *_guest_mounts(policy, made, ops),
    ]
    for part in ("vmm", "bridge"):
        rows += _part_rows(part, user, filters=2 if part == "vmm" else 1)
    rows += [
        ("vmm.program", "isolation", None),
        ("vmm.accelerator", "isolation", made["accelerator"]),
        ("vmm.network.interfaces", "network.mode", ["lo"]),
    ]
    found: list[Control] = [{"name": name, "field": field, "asked": asked} for name, field, asked in rows]
    if limited:
        groups = cgroup_controls(
            ring_limits(policy.limits, made["accelerator"]), host, disks=disks, skip=skip
        )
        for control in groups:
            if control["name"] == "cgroup.membership":
                found += [{**control, "name": f"{part}.cgroup.membership"} for part in ("vmm", "bridge")]
            elif control["name"] in _OF_THE_MACHINE:
                # Not the job's: how much the machine and its VMM may take of the host.
                found.append({**control, "field": "isolation"})
            else:
                found.append(control)
        if host.cgroup.version in ("v1", "hybrid") and not host.rootless:
            allowed = ["c 10:232 rw"] if made["accelerator"] == "kvm" else []
            found.append({"name": "cgroup.devices", "field": "devices", "asked": allowed})
    return found


def _guest_mounts(policy: Policy, made: Machine, ops: list[Op]) -> list[tuple[str, str, Value]]:
    """Return the rows of the guest's own mounts, in the words of the linux tier: its kernel is a Linux as well."""
    staged = [row for row in stage_controls(ops) if not row["asked"] or " of " not in str(row["asked"])]
    rows: list[tuple[str, str, Value]] = [(row["name"], row["field"], row["asked"]) for row in staged]
    limits = policy.limits
    rows.append(
        (
            "mount:/dev/shm",
            "limits.shm",
            f"tmpfs rw,nosuid,nodev,noexec size={limits.shm_bytes} inodes={limits.inodes}",
        )
    )
    rows.append(("mount:/proc", "filesystem", "proc rw,nosuid,nodev,noexec"))
    rows.append(("mount:/dev", "devices", "tmpfs rw,nosuid,noexec size=65536 inodes=64"))
    rows.append(("mount:/dev/pts", "devices", "devpts rw,nosuid,noexec"))
    if policy.filesystem.sysfs:
        rows.append(("mount:/sys", "filesystem.sysfs", "sysfs ro,nosuid,nodev,noexec"))
    rows.append(("mounts.others", "filesystem.mounts", []))
    for disk in made["disks"]:
        if disk["target"] != "/":
            kind = "erofs ro" if disk["read_only"] else "overlay rw"
            rows.append((f"mount:{disk['target']}", "filesystem.mounts", f"{kind},nosuid,nodev"))
    return rows


def _part_rows(part: str, user: tuple[int, int], *, filters: int) -> list[tuple[str, str, Value]]:
    """Say what the VMM and the bridge are reduced to, each of them a process of the host's."""
    return [
        (f"{part}.credentials.uid", "user", user[0]),
        (f"{part}.credentials.gid", "user", user[1]),
        (f"{part}.credentials.range", "user", None),
        *(
            (f"{part}.capabilities.{kind}", "capabilities", [])
            for kind in ("inheritable", "permitted", "effective", "bounding", "ambient")
        ),
        (f"{part}.no_new_privileges", "no_new_privileges", True),
        (f"{part}.seccomp.mode", "seccomp", "filter"),
        (f"{part}.seccomp.filters", "seccomp", filters),
        *(
            (f"{part}.namespace.{kind}", "user" if kind == "user" else "namespaces", "own")
            for kind in NAMESPACES
        ),
    ]
