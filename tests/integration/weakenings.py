"""One way for each control to weaken it behind the plan's own words: data of test_proof.py.

Every weakening leaves `controls`, what was asked, as it is, and changes what is really done: the OCI object, the
staging, the configuration that the runtime gets, or the started sandbox.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec

from ringfence.host.cgroups import cgroup_facts
from ringfence.plan.document import Plan
from ringfence.sandbox import launch

MIB = 1 << 20
V2 = cgroup_facts().version == "v2"


class Weakening(msgspec.Struct, frozen=True):
    """What is done behind the plan's words, and the controls that must not hold then."""

    seen: tuple[str, ...]
    plan: Callable[[Plan], object] | None = None  # changes the plan
    config: Callable[[dict[str, object]], object] | None = None  # changes what the runtime is given
    started: Callable[[launch.Running], object] | None = None  # changes the sandbox before its job is made
    maps: bool = False  # gives the user namespace another map


def without(name: str) -> Callable[[Plan], object]:
    """Take a namespace out of the plan."""

    def change(plan: Plan) -> None:
        spaces = plan["oci"]["linux"]["namespaces"]
        spaces[:] = [space for space in spaces if space["type"] != name]

    return change


def option(target: str, old: str, new: str = "") -> Callable[[Plan], object]:
    """Take or change an option of a mount that the runtime makes."""

    def change(plan: Plan) -> None:
        mount = next(mount for mount in plan["oci"]["mounts"] if mount["destination"] == target)
        place = mount["options"].index(old)
        mount["options"][place : place + 1] = [new] if new else []

    return change


def operation(plan: Plan, at: str, kind: str) -> dict[str, object]:
    return next(op for op in plan["stage"] if op.get("at") == at and op["op"] == kind)  # type: ignore[return-value]


def drop(plan: Plan, at: str, kind: str) -> None:
    plan["stage"].remove(operation(plan, at, kind))  # type: ignore[arg-type]


def rlimit(name: str, value: int | None) -> Callable[[Plan], object]:
    """Change a limit, or leave it what the host has."""

    def change(plan: Plan) -> None:
        limits = plan["oci"]["process"]["rlimits"]
        limits[:] = [limit for limit in limits if limit["type"] != name]
        if value is not None:
            limits.append({"type": name, "soft": value, "hard": value})

    return change


def resource(kind: str, **values: object) -> Callable[[Plan], object]:
    """Change values of a cgroup controller."""
    return lambda plan: plan["oci"]["linux"]["resources"][kind].update(values)  # type: ignore[literal-required]


def throttle(kind: str) -> Callable[[Plan], object]:
    return lambda plan: plan["oci"]["linux"]["resources"]["blockIO"][kind][0].update(rate=1 << 30)  # type: ignore[literal-required]


def capabilities(*sets: str) -> Callable[[Plan], object]:
    return lambda plan: plan["oci"]["process"]["capabilities"].update({key: ["CAP_CHOWN"] for key in sets})  # type: ignore[typeddict-item]


def writable_root(plan: Plan) -> None:
    place = plan["stage"].index(operation(plan, "root", "overlay"))  # type: ignore[arg-type]
    tmpfs = {"op": "tmpfs", "at": "upper", "size_bytes": MIB, "inodes": 100, "mode": 0o700, "owner": "root"}
    names = ("upper", "upper/files", "upper/work")
    made = [{"op": "directory", "at": name, "mode": 0o755, "owner": "root"} for name in names]
    plan["stage"][place : place + 1] = [
        made[0], tmpfs, *made[1:], {**operation(plan, "root", "overlay"), "upper": "upper"},
    ]  # type: ignore[list-item] # fmt: skip
    plan["oci"]["root"]["readonly"] = False


def shared_network(plan: Plan) -> None:
    without("network")(plan)
    plan["oci"]["mounts"] = [
        mount for mount in plan["oci"]["mounts"] if mount["type"] != "sysfs"
    ]  # refused then


def shared_ipc(plan: Plan) -> None:
    without("ipc")(plan)
    plan["oci"]["linux"]["sysctl"].clear()  # refused then


def away(running: launch.Running) -> None:
    """Move the agent, and so the job that it will make, out of its memory cgroup."""
    assert running.cgroup is not None
    Path(running.cgroup.layout.mount_of("memory"), "cgroup.procs").write_text(str(running.agent_pid))


def no_uts(config: dict[str, object]) -> None:
    del config["hostname"]
    linux = config["linux"]
    linux["namespaces"] = [space for space in linux["namespaces"] if space["type"] != "uts"]  # type: ignore[index,call-overload]


ALLOW_DISK = {"allow": True, "type": "b", "major": 254, "minor": 0, "access": "rwm"}
FUSE = {"destination": "/dev/fuse", "type": "bind", "source": "/dev/fuse", "options": ["bind"]}
IDS = ("credentials.uid", "credentials.gid", "credentials.range")
PERMITTED = tuple(
    f"capabilities.{name}" for name in ("inheritable", "permitted", "effective", "bounding", "ambient")
)

TABLE: dict[str, Weakening] = {
    "credentials.uid": Weakening(
        ("credentials.uid",), lambda plan: plan["oci"]["process"]["user"].update(uid=1001)
    ),
    "credentials.gid": Weakening(
        ("credentials.gid",), lambda plan: plan["oci"]["process"]["user"].update(gid=1001)
    ),
    "credentials.groups": Weakening(
        ("credentials.groups",), lambda plan: plan["oci"]["process"]["user"].update(additionalGids=[5])
    ),
    "credentials.range": Weakening(("credentials.range",), maps=True),
    "capabilities.bounding": Weakening(("capabilities.bounding",), capabilities("bounding")),
    "capabilities.inheritable": Weakening(
        ("capabilities.inheritable", "capabilities.bounding"), capabilities("inheritable", "bounding")
    ),
    # After an execve these three come and go together, and ambient needs the other sets.
    "capabilities.ambient": Weakening(
        PERMITTED, capabilities(*(name.rpartition(".")[2] for name in PERMITTED))
    ),
    "no_new_privileges": Weakening(
        ("no_new_privileges",), lambda plan: plan["oci"]["process"].update(noNewPrivileges=False)
    ),
    "seccomp.mode": Weakening(
        ("seccomp.mode", "seccomp.filters", "seccomp.answers"),
        lambda plan: plan["oci"]["linux"].pop("seccomp"),  # type: ignore[misc]
    ),
    "namespace.network": Weakening(
        ("namespace.network", "network.interfaces", "mount:/sys", "paths.masked"), shared_network
    ),
    "namespace.ipc": Weakening(("namespace.ipc", "sysctl:kernel.msgmax"), shared_ipc),
    "namespace.cgroup": Weakening(("namespace.cgroup",), without("cgroup")),
    "namespace.uts": Weakening(("namespace.uts", "hostname"), config=no_uts),
    "hostname": Weakening(("hostname",), config=lambda config: config.update(hostname="another")),
    "mount:/proc": Weakening(("mount:/proc",), option("/proc", "nosuid")),
    "mount:/dev": Weakening(("mount:/dev",), option("/dev", "nr_inodes=64", "nr_inodes=640")),
    "mount:/dev/pts": Weakening(("mount:/dev/pts",), option("/dev/pts", "noexec")),
    "mount:/dev/shm": Weakening(("mount:/dev/shm",), option("/dev/shm", f"size={16 * MIB}", "size=64m")),
    "mount:/sys": Weakening(("mount:/sys",), option("/sys", "ro")),
    "mounts.others": Weakening(
        ("mounts.others",),
        lambda plan: plan["oci"]["mounts"].append(
            {"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]}
        ),
    ),
    "paths.masked": Weakening(
        ("paths.masked",), lambda plan: plan["oci"]["linux"]["maskedPaths"].remove("/proc/keys")
    ),
    "paths.read_only": Weakening(
        ("paths.read_only",), lambda plan: plan["oci"]["linux"]["readonlyPaths"].remove("/proc/sys")
    ),
    "devices.nodes": Weakening(("devices.nodes",), lambda plan: plan["oci"]["mounts"].append(FUSE)),
    "sysctl:kernel.msgmax": Weakening(
        ("sysctl:kernel.msgmax",),
        lambda plan: plan["oci"]["linux"]["sysctl"].update({"kernel.msgmax": "9001"}),
    ),
    "cgroup.devices": Weakening(
        ("cgroup.devices",),
        lambda plan: plan["oci"]["linux"]["resources"]["devices"].append(ALLOW_DISK),  # type: ignore[arg-type]
    ),
    "rlimit.core": Weakening(("rlimit.core",), rlimit("RLIMIT_CORE", 4096)),
    "rlimit.fsize": Weakening(("rlimit.fsize",), rlimit("RLIMIT_FSIZE", None)),
    "rlimit.nofile": Weakening(("rlimit.nofile",), rlimit("RLIMIT_NOFILE", 1024)),
    "rlimit.nproc": Weakening(("rlimit.nproc",), rlimit("RLIMIT_NPROC", None)),
    "rlimit.stack": Weakening(("rlimit.stack",), rlimit("RLIMIT_STACK", 16 * MIB)),
    "cgroup.membership": Weakening(("cgroup.membership",), started=away),
    "cgroup.memory_bytes": Weakening(
        ("cgroup.memory_bytes",), resource("memory", limit=512 * MIB, swap=512 * MIB)
    ),
    "cgroup.swap_bytes": Weakening(("cgroup.swap_bytes",), resource("memory", swap=300 * MIB)),
    "cgroup.cpu_quota_us": Weakening(("cgroup.cpu_quota_us",), resource("cpu", quota=150_000)),
    "cgroup.cpu_period_us": Weakening(("cgroup.cpu_period_us",), resource("cpu", period=50_000)),
    "cgroup.cpu_weight": Weakening(
        ("cgroup.cpu_weight",),
        resource("unified", **{"cpu.weight": "400"}) if V2 else resource("cpu", shares=4096),
    ),
    "cgroup.cpuset": Weakening(("cgroup.cpuset",), resource("cpu", cpus="0-1")),
    "cgroup.pids": Weakening(("cgroup.pids",), resource("pids", limit=4096)),
    "cgroup.io.rbps": Weakening(("cgroup.io.rbps",), throttle("throttleReadBpsDevice")),
    "cgroup.io.riops": Weakening(("cgroup.io.riops",), throttle("throttleReadIOPSDevice")),
    "mount:/": Weakening(("mount:/",), writable_root),
    "mount:/tmp": Weakening(
        ("mount:/tmp",), lambda plan: operation(plan, "root/tmp", "tmpfs").update(inodes=1 << 20)
    ),
    "mount:/work": Weakening(("mount:/work",), lambda plan: drop(plan, "root/work", "tmpfs")),
    "mount:/probe": Weakening(
        ("mount:/probe",), lambda plan: operation(plan, "/probe", "bind").update(read_only=False)
    ),
    "mount:/data": Weakening(("mount:/data",), lambda plan: drop(plan, "/data", "bind")),
}

if V2:
    TABLE["cgroup.io.wbps"] = Weakening(("cgroup.io.wbps",), throttle("throttleWriteBpsDevice"))
    TABLE["cgroup.io.wiops"] = Weakening(("cgroup.io.wiops",), throttle("throttleWriteIOPSDevice"))
    del TABLE["cgroup.devices"]  # a program of the kernel's, which has no file that says what it allows

# Controls that no plan can weaken alone, and where else they are seen to fail.
ELSEWHERE = {
    "capabilities.permitted": "capabilities.ambient",
    "capabilities.effective": "capabilities.ambient",
    "network.interfaces": "namespace.network",
    "seccomp.filters": "test_second_filter_is_seen",
    "seccomp.answers": "test_filter_that_lets_everything_through",
    "namespace.user": "test_process_of_the_host_proves_nothing",  # runtimes refuse mappings without it
    "namespace.pid": "test_process_of_the_host_proves_nothing",  # the kernel refuses /proc without it
    "namespace.mount": "test_process_of_the_host_proves_nothing",  # the set-up has one of its own in any case
    "descriptors": "test_process_of_the_host_proves_nothing",  # the agent closes whatever it inherits
}
