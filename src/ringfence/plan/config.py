"""The OCI config.json of a plan, without what differs from sandbox to sandbox."""

from ringfence.host.facts import Host
from ringfence.host.sources import Source
from ringfence.plan.document import Control, Op, Owner, Value
from ringfence.plan.limits import Disks, resources, rlimits
from ringfence.plan.oci import Capabilities, Mount, Namespace, OciConfig
from ringfence.plan.seccomp_match import LinuxSeccomp
from ringfence.plan.stage import AGENT
from ringfence.plan.workload import Workload
from ringfence.policy.model import Policy

# Filled in for each sandbox by ringfence.runtime.bundle.
BY_RUN = "(set for each sandbox)"
# Stands in a mount's source for the sandbox's staging directory.
STAGE = "@STAGE@"
_KVM = "devices/kvm"
RANGE_SIZE = 65536
APPARMOR_PROFILE = "ringfence-default"
NAMESPACES = ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")
DEVICES = ("full", "null", "random", "tty", "urandom", "zero")

# runc's list, and what else tells a job about the host or its kernel's memory.
MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/cmdline",
    "/proc/interrupts",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/pagetypeinfo",
    "/proc/partitions",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/slabinfo",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
)
MASKED_SYS = (
    "/sys/class/dmi",
    "/sys/devices/virtual/dmi",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def config(
    policy: Policy,
    workload: Workload,
    host: Host,
    *,
    user: tuple[int, int],
    range_size: int,
    seccomp: LinuxSeccomp,
    disks: Disks,
    skip: frozenset[str],
) -> OciConfig:
    """Return the runtime-spec object; the command in it is the agent, which gets the job's over its socket."""
    uid, gid = user
    capabilities = list(policy.capabilities)
    sets: Capabilities = {
        "bounding": capabilities,
        "effective": capabilities,
        "inheritable": capabilities,
        "permitted": capabilities,
        "ambient": capabilities,
    }
    mapping = {"containerID": 0, "hostID": 0, "size": range_size}
    # A rootless sandbox is started from inside its user namespace: the runtime must not make another one.
    kinds = [kind for kind in NAMESPACES if not (kind == "user" and host.rootless)]
    found: OciConfig = {
        "ociVersion": "1.0.2",
        # Read-only twice over as root. In a user's own mount namespace the runtime's remount would clear nosuid and
        # nodev, so there the overlay's own read-only has to do; the proof looks at the mount either way.
        "root": {"path": BY_RUN, "readonly": policy.filesystem.root == "read-only" and not host.rootless},
        "process": {
            "terminal": False,
            "user": {"uid": uid, "gid": gid, "additionalGids": [], "umask": 0o022},
            "args": [AGENT],
            "env": [],
            "cwd": "/",
            "capabilities": sets,
            "rlimits": rlimits(policy.limits, skip),
            "noNewPrivileges": policy.no_new_privileges,
        },
        "hostname": BY_RUN,
        "mounts": _mounts(policy, workload),
        "linux": {
            "namespaces": [_namespace(kind) for kind in kinds],
            "uidMappings": [] if host.rootless else [{**mapping}],  # type: ignore[typeddict-item]
            "gidMappings": [] if host.rootless else [{**mapping}],  # type: ignore[typeddict-item]
            "cgroupsPath": BY_RUN,
            "resources": resources(
                policy.limits,
                host,
                disks=disks,
                skip=skip,
                devices=tuple(source.rule for source in extra_devices(workload)),
            ),
            "sysctl": dict(sorted(policy.sysctls.items())),
            "seccomp": seccomp,
            "rootfsPropagation": "private",
            "maskedPaths": [*MASKED, *(MASKED_SYS if policy.filesystem.sysfs else ())],
            "readonlyPaths": list(READ_ONLY),
        },
    }
    if apparmor(policy, host):
        found["process"]["apparmorProfile"] = APPARMOR_PROFILE
    return found


def kvm_node(host: Host, owner: Owner) -> list[Op]:
    """Return what stages /dev/kvm for a ring: the host's own may be opened by nobody in it.

    Without root no node can be made, and the host's must do: then the caller's group has to be let in by its mode.
    """
    if host.rootless:
        return []
    return [{"op": "node", "at": _KVM, "number": "10:232", "owner": owner}]


def kvm_mount(host: Host) -> Mount:
    """Return the mount that shows a ring its /dev/kvm."""
    source = "/dev/kvm" if host.rootless else f"{STAGE}/{_KVM}"
    return {
        "destination": "/dev/kvm",
        "type": "bind",
        "source": source,
        "options": ["bind", "nosuid", "noexec"],
    }


def apparmor(policy: Policy, host: Host) -> bool:
    """Say whether the job runs under our AppArmor profile: the host has loaded it and the policy wants it."""
    return policy.lsm != "none" and host.lsm.apparmor and host.lsm.apparmor_profile


def _namespace(kind: str) -> Namespace:
    return {"type": kind, "path": BY_RUN} if kind == "user" else {"type": kind}


def _mounts(policy: Policy, workload: Workload) -> list[Mount]:
    shm = [f"size={policy.limits.shm_bytes}", f"nr_inodes={policy.limits.inodes}", "mode=1777"]
    mounts: list[Mount] = [
        {
            "destination": "/proc",
            "type": "proc",
            "source": "proc",
            "options": ["nosuid", "nodev", "noexec"],
        },
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "noexec", "mode=755", "size=65536", "nr_inodes=64"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "max=64"],
        },
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": ["nosuid", "nodev", "noexec", *shm],
        },
    ]
    if policy.filesystem.sysfs:
        options = ["nosuid", "nodev", "noexec", "ro"]
        mounts.append({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": options})
    for source in extra_devices(workload):
        mounts.append(
            {
                "destination": source.target,
                "type": "bind",
                "source": source.source,
                "options": ["bind", "nosuid", "noexec"],
            }
        )
    return mounts


def extra_devices(workload: Workload) -> list[Source]:
    """Return the devices of the policy, without those that are always there."""
    always = [f"/dev/{name}" for name in DEVICES]
    return [source for source in workload.sources if source.kind == "device" and source.target not in always]


def config_controls(
    policy: Policy, workload: Workload, oci: OciConfig, host: Host, skip: frozenset[str]
) -> list[Control]:
    """Return what the kernel must show of `oci`, apart from limits and staged mounts."""
    process, devices = oci["process"], extra_devices(workload)
    rows: list[tuple[str, str, Value]] = [
        ("credentials.uid", "user", process["user"]["uid"]),
        ("credentials.gid", "user", process["user"]["gid"]),
        # A user namespace that maps the caller's own id alone may not change groups: user_namespaces(7).
        *([] if "user" in skip else [("credentials.groups", "user", [])]),
        ("credentials.range", "user", None),
        *(
            (f"capabilities.{kind}", "capabilities", sorted(policy.capabilities))
            for kind in ("inheritable", "permitted", "effective", "bounding", "ambient")
        ),
        ("no_new_privileges", "no_new_privileges", policy.no_new_privileges),
        ("seccomp.mode", "seccomp", "filter"),
        ("seccomp.filters", "seccomp", 1),
        *((f"namespace.{kind}", "user" if kind == "user" else "namespaces", "own") for kind in NAMESPACES),
        ("hostname", "namespaces", None),
        ("network.interfaces", "network.mode", ["lo"]),
        *_mount_rows(policy),
        ("mounts.others", "filesystem.mounts", []),
        ("paths.masked", "filesystem.sysfs", oci["linux"]["maskedPaths"]),
        ("paths.read_only", "filesystem.sysfs", oci["linux"]["readonlyPaths"]),
        (
            "devices.nodes",
            "devices",
            sorted([*DEVICES, *(device.target.removeprefix("/dev/") for device in devices)]),
        ),
        *((f"sysctl:{name}", "sysctls", value) for name, value in oci["linux"]["sysctl"].items()),
        ("descriptors", "descriptors", ["0", "1", "2"]),
    ]
    if host.cgroup.version in ("v1", "hybrid") and not host.rootless:
        rows.append(("cgroup.devices", "devices", sorted(device.rule for device in devices)))
    if "apparmorProfile" in process:
        rows.append(("lsm.apparmor", "lsm", APPARMOR_PROFILE))
    return [{"name": name, "field": field, "asked": asked} for name, field, asked in rows]


def _mount_rows(policy: Policy) -> list[tuple[str, str, Value]]:
    limits = policy.limits
    rows: list[tuple[str, str, Value]] = [
        ("mount:/proc", "filesystem", "proc rw,nosuid,nodev,noexec"),
        ("mount:/dev", "devices", "tmpfs rw,nosuid,noexec size=65536 inodes=64"),
        ("mount:/dev/pts", "devices", "devpts rw,nosuid,noexec"),
        (
            "mount:/dev/shm",
            "limits.shm",
            f"tmpfs rw,nosuid,nodev,noexec size={limits.shm_bytes} inodes={limits.inodes}",
        ),
    ]
    if policy.filesystem.sysfs:
        rows.append(("mount:/sys", "filesystem.sysfs", "sysfs ro,nosuid,nodev,noexec"))
    return rows
