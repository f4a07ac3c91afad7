"""The gVisor tier of a plan: a ring of namespaces and cgroup around runsc, and what runs behind its kernel.

Two runtime-spec objects come of one policy. That of the ring is carried out by crun or runc: its processes are the
door, gVisor's gofer and its sentry, and the policy's memory, CPU and I/O limits are those of its cgroup. That of the
guest is carried out by runsc in it: its processes are the agent and the job, and the rest of the policy is theirs.
Source for what runsc takes from a config.json, and its flags: https://gvisor.dev/docs/user_guide/compatibility/
and ``runsc flags``.
"""

import msgspec

from ringfence.errors import HostError, MountError
from ringfence.host.facts import Host
from ringfence.plan.config import BY_RUN, NAMESPACES, kvm_mount, kvm_node
from ringfence.plan.document import Control, Guest, Op, Value
from ringfence.plan.gvisor_compat import warnings
from ringfence.plan.limits import AGENT_PROCESSES, Disks, cgroup_controls, resources, rlimits
from ringfence.plan.oci import Capabilities, Mount, OciConfig, Rlimit
from ringfence.plan.seccomp import OWN, ring_seccomp
from ringfence.plan.seccomp_match import WHOLE_INT, Arg, LinuxSeccomp, Rule, fits
from ringfence.plan.seccomp_rules import ALLOW, ENOSYS, EPERM, ERRNO, LETS_PASS
from ringfence.plan.stage import AGENT, stage_controls
from ringfence.plan.workload import Workload
from ringfence.policy.model import Limits, Policy

ROOT = "/root"
PROGRAM = "/runsc"
BUNDLE = "/bundle"
STATE = "/state"
SHM = "/shm"
# gVisor gives its sentry the ids of "nobody": runsc/sandbox/sandbox.go of the release 20240729.
SENTRY_ID = 65534
# What a runsc needs to make namespaces for its parts and to hand the gofer what it keeps.
RING_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_ADMIN",
    "CAP_SYS_CHROOT",
)
# What runsc leaves its gofer, all of it in the ring's user namespace: it acts as the owner of every file it serves.
GOFER_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_SYS_CHROOT",
)
# gVisor knows the capabilities up to here (linux/capability.h of Linux 4.4); newer ones it drops in silence.
_LAST_CAPABILITY = "CAP_AUDIT_READ"
_NEWER = frozenset({"CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"})
_NAMED_FLAGS = 4
_TRACING = "ptrace"
_SIGKILL, _SIGSTOP = 9, 19  # asm-generic/signal.h
_F_SETSIG = 10  # asm-generic/fcntl.h
_CLONE_PARENT = 0x8000  # linux/sched.h
# A Go program of some goroutines, and for each process of the job a process and a thread that stand for it on the host.
RING_PROCESSES = 320
# While it starts; at the gate the limit becomes what is in use then, and the policy's.
START_BYTES = 160 << 20
_RING_FILES = 16384
_STATE_BYTES, _STATE_INODES = 4 << 20, 256
_SCRATCH_BYTES = 1 << 20
_NO_SYS_BYTES = 4096


def flags(policy: Policy, platform: str) -> list[str]:
    """Return runsc's global flags: everything that could reach the host off, whatever its defaults become."""
    # What is mounted from the host may change under the sandbox; what only the sandbox sees cannot.
    access = "shared" if policy.filesystem.mounts else "exclusive"
    return [
        f"--platform={platform}",
        "--network=none",
        "--directfs=false",
        "--overlay2=none",
        "--host-uds=none",
        "--host-fifo=none",
        "--oci-seccomp=true",
        "--ignore-cgroups=true",
        f"--file-access-mounts={access}",
        "--net-raw=false",
        "--nvproxy=false",
        "--tpuproxy=false",
        "--debug=false",
        "--allow-flag-override=false",
    ]


def choose_platform(host: Host, wanted: str) -> str:
    """Return the platform that intercepts system calls: `wanted`, or for "" the best that works here.

    Raises HostError when runsc is missing, too old, or nothing it offers works.
    """
    facts = host.gvisor
    if "runsc" not in host.runtimes or facts is None:
        raise HostError("runsc is not installed", hint="apt-get install runsc, then 'ringfence doctor'")
    if facts.missing:
        raise _unusable(host.runtimes["runsc"].path, facts.missing)
    if wanted:
        if wanted in facts.platforms:
            return wanted
        why = facts.reasons.get(wanted, "runsc knows no such platform")
        raise HostError(
            f"gVisor's platform {wanted} does not work here: {why}", hint="leave --gvisor-platform out"
        )
    if not facts.platforms:
        why = "; ".join(f"{name}: {reason}" for name, reason in sorted(facts.reasons.items()))
        raise HostError(f"no platform of gVisor works here ({why})", hint="-i linux, or another host")
    return facts.platforms[0]


def _unusable(path: str, missing: tuple[str, ...]) -> HostError:
    if "--root" in missing:  # which every release has
        return HostError(
            f"{path} does not answer as a runsc does", hint=f"try '{path} flags'; install runsc anew"
        )
    more = f" and {len(missing) - _NAMED_FLAGS} more" if len(missing) > _NAMED_FLAGS else ""
    return HostError(
        f"{path} is too old: it lacks {', '.join(missing[:_NAMED_FLAGS])}{more}",
        hint="Debian 13 has a newer runsc; docs/install.md says how to get it on Debian 12",
    )


def check(policy: Policy, workload: Workload) -> None:
    """Refuse what gVisor would drop in silence and no table of fields can know. Raises HostError, MountError."""
    unknown = [name for name in policy.capabilities if name in _NEWER]
    if unknown:
        raise HostError(
            f"gVisor does not know {', '.join(unknown)}",
            hint=f"it knows the capabilities up to {_LAST_CAPABILITY}; -i linux has all",
        )
    if "CAP_NET_RAW" in policy.capabilities:
        raise HostError("gVisor's raw sockets are off, and CAP_NET_RAW with them", hint="use -i linux")
    for source in workload.sources:
        if source.kind in ("socket", "fifo"):
            raise MountError(
                f"gVisor does not open the host's {source.kind} {source.source!r}",
                hint="use -i linux, or mount a directory of plain files",
            )


def guest(
    policy: Policy,
    host: Host,
    *,
    platform: str,
    user: tuple[int, int],
    seccomp: LinuxSeccomp,
    ops: list[Op],
    skip: frozenset[str],
) -> Guest:
    """Return what runs behind the sentry: the agent under the job's user, with the job's rights and limits.

    Raises HostError for rights that the sentry would not give.
    """
    uid, gid = user
    if policy.capabilities and uid != 0:
        raise HostError(
            f"gVisor gives capabilities to user 0 alone, and the job is user {uid}: it has no ambient ones",
            hint="user: 0:0 (--user 0:0), which is root by name only, or -i linux",
        )
    capabilities = list(policy.capabilities)
    sets: Capabilities = {
        "bounding": capabilities,
        "effective": capabilities,
        "inheritable": capabilities,
        "permitted": capabilities,
        "ambient": capabilities,
    }
    program = host.runtimes["runsc"]
    oci: OciConfig = {
        "ociVersion": "1.0.2",
        "root": {"path": ROOT, "readonly": policy.filesystem.root == "read-only"},
        "process": {
            "terminal": False,
            "user": {"uid": uid, "gid": gid, "additionalGids": [], "umask": 0o022},
            "args": [AGENT],
            "env": [],
            "cwd": "/",
            "capabilities": sets,
            "rlimits": guest_rlimits(policy.limits, skip),
            "noNewPrivileges": True,
        },
        "hostname": BY_RUN,
        "mounts": _guest_mounts(policy, ops),
        "linux": {
            # A user namespace of its own would be one of the sentry's: the ring has a real one already.
            "namespaces": [{"type": kind} for kind in NAMESPACES if kind not in ("user", "cgroup")],
            "uidMappings": [],
            "gidMappings": [],
            "cgroupsPath": "",
            "resources": {},
            "sysctl": {},
            "seccomp": guest_seccomp(seccomp, own=policy.seccomp in OWN),
            "rootfsPropagation": "private",
            "maskedPaths": [],
            "readonlyPaths": [],
        },
    }
    return {
        "program": program.path,
        "version": program.version_text,
        "platform": platform,
        "flags": flags(policy, platform),
        "oci": oci,
    }


def guest_seccomp(wanted: LinuxSeccomp, *, own: bool = False) -> LinuxSeccomp:
    """Return the filter `wanted` in the words that gVisor's kernel has for it, which are fewer; it allows no more.

    Tracing other processes is denied in any case: the sentry asks the filter before a tracer may change the call, and
    not again, so that whoever may trace a child of his own would have every call that there is. And the agent cannot be
    killed or stopped: the sentry, other than Linux, would do that to process 1, who keeps the time of a detached job.
    `own` says that it is one of our profiles, whose rules never overlap.
    """
    rules = [_guest_rule(rule) for rule in wanted["syscalls"]]
    if own:
        rules = _shortened(rules)
    if any(_TRACING in rule["names"] and rule["action"] == ALLOW for rule in rules):
        rules = [_without_tracing(rule) for rule in rules]
        rules.insert(0, {"names": [_TRACING], "action": ERRNO, "errnoRet": EPERM})
    made: LinuxSeccomp = {
        "defaultAction": _guest_action(wanted["defaultAction"], wanted.get("defaultErrnoRet")),
        "architectures": wanted["architectures"],
        "flags": [],
        # The sentry takes the first rule that fits.
        "syscalls": [*_agent_lives(), *(rule for rule in rules if rule["names"])],
    }
    if made["defaultAction"] == ERRNO and "defaultErrnoRet" in wanted:
        made["defaultErrnoRet"] = wanted["defaultErrnoRet"]
    return made


def _shortened(rules: list[Rule]) -> list[Rule]:
    """Deny what of a call is not allowed by one rule without arguments, after those that allow the rest.

    The kernel's own libraries of filters want each value denied by itself; the sentry, which takes the first rule that
    fits, has room for 4,096 instructions, and each comparison costs twelve.
    """
    judged = {
        name for rule in rules if rule.get("args") and rule["action"] == ALLOW for name in rule["names"]
    }
    kept: list[Rule] = []
    for rule in rules:
        denies = rule.get("args") and rule["action"] != ALLOW
        names = [name for name in rule["names"] if not (denies and name in judged)]
        if names:
            kept.append({**rule, "names": names})
    return [*kept, {"names": sorted(judged), "action": ERRNO, "errnoRet": EPERM}]


def _agent_lives() -> list[Rule]:
    """Deny the two signals that nobody can handle, to process 1 and to its one thread.

    Besides the calls that send one there are two ways to have the sentry do it: a descriptor whose owner is process 1
    and that chooses its signal, and a child that names its end's signal and has the agent for its parent.
    """
    return [
        _denied("fcntl", fits(1, (WHOLE_INT, _F_SETSIG))),
        _denied("clone", fits(0, (_CLONE_PARENT, _CLONE_PARENT))),
        *_not_to_the_agent(),
    ]


def _denied(name: str, *arguments: Arg) -> Rule:
    return {"names": [name], "action": ERRNO, "errnoRet": EPERM, "args": list(arguments)}


def _not_to_the_agent() -> list[Rule]:
    """Deny the two signals of kill(2), and all signals of its kin, which nobody sends to process 1."""
    kill = [
        _denied("kill", fits(0, (WHOLE_INT, 1)), fits(1, (WHOLE_INT, signal)))
        for signal in (_SIGKILL, _SIGSTOP)
    ]
    kin = [("tkill", 0), ("rt_sigqueueinfo", 0), ("tgkill", 1), ("rt_tgsigqueueinfo", 1)]
    return [*kill, *(_denied(name, fits(place, (WHOLE_INT, 1))) for name, place in kin)]


def _without_tracing(rule: Rule) -> Rule:
    return {**rule, "names": [name for name in rule["names"] if name != _TRACING]}


def _guest_rule(rule: Rule) -> Rule:
    action = _guest_action(rule["action"], rule.get("errnoRet"))
    made: Rule = {**rule, "action": action}
    if action != ERRNO:
        made.pop("errnoRet", None)
    return made


def _guest_action(action: str, errno: int | None) -> str:
    """Return the word for `action`; there is none for logging, and none for killing more than a thread."""
    if action == ERRNO:
        # gVisor up to 20240729 knows no number but EPERM, with which no library falls back to what an older kernel
        # has: glibc would make no threads. A call that a tracer should decide about, and there is none, is ENOSYS.
        return "SCMP_ACT_TRACE" if errno == ENOSYS else ERRNO
    if action in LETS_PASS:
        return ALLOW
    return "SCMP_ACT_TRAP" if action == "SCMP_ACT_TRAP" else "SCMP_ACT_KILL"


def guest_rlimits(limits: Limits, skip: frozenset[str]) -> list[Rlimit]:
    """Return the job's rlimits, which the sentry keeps; RLIMIT_NPROC stands for both limits on processes.

    The sentry counts tasks of a user id against it, and there is no pids controller behind it that could do more.
    """
    counts = [limits.pids if "limits.pids" not in skip else None, limits.threads]
    least = min((count for count in counts if count is not None), default=None)
    return rlimits(msgspec.structs.replace(limits, threads=least), skip - {"limits.threads"})


def _guest_mounts(policy: Policy, ops: list[Op]) -> list[Mount]:
    mounts: list[Mount] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "nodev", "noexec"]},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "noexec", "mode=755"],
        },
        # The host's tmpfs and not the sentry's, which would have no limit on files.
        {
            "destination": "/dev/shm",
            "type": "bind",
            "source": SHM,
            "options": ["rbind", "nosuid", "nodev", "noexec", "rw"],
        },
    ]
    if policy.filesystem.sysfs:
        mounts.append(
            {
                "destination": "/sys",
                "type": "sysfs",
                "source": "sysfs",
                "options": ["nosuid", "nodev", "noexec", "ro"],
            }
        )
    else:
        # runsc mounts a /sys where the spec has none.
        mounts.append(
            {
                "destination": "/sys",
                "type": "tmpfs",
                "source": "none",
                "options": ["nosuid", "nodev", "noexec", "ro", f"size={_NO_SYS_BYTES}"],
            }
        )
    # Recursively: the kernel shows no mount in another user namespace without what is mounted below it.
    for target, read_only in _served(ops):
        way = "ro" if read_only else "rw"
        mounts.append(
            {
                "destination": target,
                "type": "bind",
                "source": ROOT + target,
                "options": ["rbind", "nosuid", "nodev", way],
            }
        )
    return mounts


def _served(ops: list[Op]) -> list[tuple[str, bool]]:
    """Return (target, read-only) of every mount that is staged below the root, which the gofer serves one by one."""
    found: list[tuple[str, bool]] = []
    for op in ops:
        if op["op"] == "tmpfs" and op["at"].startswith("root/"):
            found.append((op["at"].removeprefix("root"), False))
        elif op["op"] == "share":
            found.append((op["at"], False))
        elif op["op"] == "bind" and op["below"] == "root":
            found.append((op["at"], op["read_only"]))
    return found


def ring_stage(ops: list[Op], host: Host, limits: Limits, guest: Guest) -> list[Op]:
    """Return `ops` and what the ring has beside the job's root: the door, runsc, room for its state, shared memory."""
    mine: list[Op] = [
        {"op": "directory", "at": name, "mode": 0o755, "owner": "root"}
        for name in ("proc", "dev", "tmp", "state", "bundle", "shm")
    ]
    mine.append(
        {
            "op": "tmpfs",
            "at": SHM.removeprefix("/"),
            "size_bytes": limits.shm_bytes,
            "inodes": limits.inodes,
            "mode": 0o1777,
            "owner": "root",
        }
    )
    mine.append({"op": "agent", "at": AGENT.removeprefix("/")})
    mine.append({"op": "file", "at": PROGRAM.removeprefix("/"), "text": "", "mode": 0o755})
    mine.append(
        {
            "op": "bind",
            "source": guest["program"],
            "at": PROGRAM.removeprefix("/"),
            "below": "stage",
            "kind": "file",
            "ids": "none",
            "read_only": True,
        }
    )
    mine += kvm_node(host, "root") if guest["platform"] == "kvm" else []
    # The gofer mounts what it serves below the root that it serves: there must be a place for it.
    place: Op = {"op": "directory", "at": "skeleton/dev/shm", "mode": 0o755, "owner": "root"}
    found: list[Op] = []
    for op in ops:
        found += [op, place] if op["op"] == "directory" and op["at"] == "skeleton/dev" else [op]
    return [*found, *mine]


def ring_limits(limits: Limits) -> Limits:
    """Return the limits of the ring's cgroup: the policy's, with room for the sentry's own processes."""
    if limits.pids is None:
        return limits
    return msgspec.structs.replace(limits, pids=2 * limits.pids + RING_PROCESSES - AGENT_PROCESSES)


def _ring_skip(host: Host, skip: frozenset[str]) -> frozenset[str]:
    """Return what the ring goes without: `skip`, but never the count of processes where a cgroup can keep it."""
    return skip - {"limits.pids"} if host.cgroup.writable and host.cgroup.version != "none" else skip


def ring(
    policy: Policy,
    host: Host,
    *,
    platform: str,
    range_size: int,
    disks: Disks,
    skip: frozenset[str],
) -> OciConfig:
    """Return the runtime-spec object of the ring; the runtime's command line is filled in for each sandbox."""
    names = list(RING_CAPABILITIES)
    sets: Capabilities = {
        "bounding": names,
        "effective": names,
        "inheritable": [],
        "permitted": names,
        "ambient": [],
    }
    devices = ("c 10:232 rw",) if platform == "kvm" else ()
    # The host's own bound stays, also where nothing bounds the job's processes inside.
    limited = resources(
        ring_limits(policy.limits), host, disks=disks, skip=_ring_skip(host, skip), devices=devices
    )
    # Set at the gate as well: until then gVisor alone is at work, and half a machine would make it twice as slow.
    limited["cpu"].pop("quota", None)
    limited["cpu"].pop("period", None)
    memory = limited["memory"]
    if "limit" in memory:
        memory["limit"] += START_BYTES
        if "swap" in memory:
            memory["swap"] += START_BYTES
    mapping = {"containerID": 0, "hostID": 0, "size": range_size}
    kinds = [kind for kind in NAMESPACES if not (kind == "user" and host.rootless)]
    files = min(_RING_FILES, host.hard_limits.get("nofile") or _RING_FILES)
    return {
        "ociVersion": "1.0.2",
        "root": {"path": BY_RUN, "readonly": not host.rootless},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "additionalGids": [], "umask": 0o022},
            "args": [AGENT],
            "env": [],
            "cwd": "/",
            "capabilities": sets,
            "rlimits": [
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
                {"type": "RLIMIT_NOFILE", "soft": files, "hard": files},
            ],
            "noNewPrivileges": True,
        },
        "hostname": BY_RUN,
        "mounts": _ring_mounts(platform, host),
        "linux": {
            "namespaces": [
                {"type": kind, "path": BY_RUN} if kind == "user" else {"type": kind} for kind in kinds
            ],
            "uidMappings": [] if host.rootless else [{**mapping}],  # type: ignore[typeddict-item]
            "gidMappings": [] if host.rootless else [{**mapping}],  # type: ignore[typeddict-item]
            "cgroupsPath": BY_RUN,
            "resources": limited,
            "sysctl": {},
            "seccomp": ring_seccomp(host.arch, RING_CAPABILITIES),
            "rootfsPropagation": "private",
            # runsc mounts a /proc for its parts, which the kernel allows only beside one that hides nothing.
            "maskedPaths": [],
            "readonlyPaths": [],
        },
    }


def _ring_mounts(platform: str, host: Host) -> list[Mount]:
    small = ["nosuid", "nodev", "noexec"]
    mounts: list[Mount] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": small},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "noexec", "mode=755", "size=65536", "nr_inodes=64"],
        },
        {
            "destination": "/tmp",
            "type": "tmpfs",
            "source": "tmp",
            "options": [*small, "mode=755", f"size={_SCRATCH_BYTES}", "nr_inodes=64"],
        },
        {
            "destination": STATE,
            "type": "tmpfs",
            "source": "state",
            "options": [*small, "mode=700", f"size={_STATE_BYTES}", f"nr_inodes={_STATE_INODES}"],
        },
    ]
    if platform == "kvm":
        mounts.append(kvm_mount(host))
    return mounts


def controls(
    policy: Policy,
    host: Host,
    made: Guest,
    ring_oci: OciConfig,
    ops: list[Op],
    *,
    range_size: int,
    disks: Disks,
    limited: bool,
    skip: frozenset[str],
) -> list[Control]:
    """Return what must be seen: of the job what the sentry reports, of the sentry and its parts what the host sees."""
    process = made["oci"]["process"]
    rows: list[tuple[str, str, Value]] = [
        ("credentials.uid", "user", process["user"]["uid"]),
        ("credentials.gid", "user", process["user"]["gid"]),
        ("credentials.groups", "user", []),
        *(
            (f"capabilities.{kind}", "capabilities", sorted(policy.capabilities))
            for kind in ("inheritable", "permitted", "effective", "bounding")
        ),
        ("no_new_privileges", "no_new_privileges", True),
        ("seccomp.mode", "seccomp", "filter"),
        *(
            (
                f"rlimit.{limit['type'].removeprefix('RLIMIT_').lower()}",
                _RLIMIT_FIELDS[limit["type"]],
                limit["hard"],
            )
            for limit in process["rlimits"]
        ),
        ("hostname", "namespaces", None),
        ("kernel", "isolation", "own"),
        ("network.interfaces", "network.mode", ["lo"]),
        ("guest.mount:/sys", "filesystem.sysfs", _sys_words(policy)),
        (
            "mount:/dev/shm",
            "limits.shm",
            f"tmpfs rw,nosuid,nodev size={policy.limits.shm_bytes} inodes={policy.limits.inodes}",
        ),
        ("guest.mounts.others", "filesystem.mounts", []),
        ("descriptors", "descriptors", ["0", "1", "2"]),
    ]
    rows += _part_rows(host, range_size)
    found: list[Control] = [{"name": name, "field": field, "asked": asked} for name, field, asked in rows]
    if limited:
        groups = cgroup_controls(ring_limits(policy.limits), host, disks=disks, skip=_ring_skip(host, skip))
        for control in groups:
            if control["name"] == "cgroup.membership":
                found += [
                    {**control, "name": f"{part}.cgroup.membership"} for part in ("sentry", "gofer", "door")
                ]
            else:
                found.append(control)
        if ring_oci["linux"]["resources"].get("devices") and host.cgroup.version in ("v1", "hybrid"):
            found.append({"name": "cgroup.devices", "field": "devices", "asked": _device_rules(ring_oci)})
    return [
        *found,
        *stage_controls(ops),
        {"name": "mounts.others", "field": "filesystem.mounts", "asked": []},
    ]


_RLIMIT_FIELDS = {
    "RLIMIT_CORE": "limits.core",
    "RLIMIT_FSIZE": "limits.file_size",
    "RLIMIT_NOFILE": "limits.open_files",
    "RLIMIT_NPROC": "limits.threads",
    "RLIMIT_STACK": "limits.stack",
}


def _sys_words(policy: Policy) -> str:
    return "sysfs ro" if policy.filesystem.sysfs else f"tmpfs ro size={_NO_SYS_BYTES}"


def _device_rules(ring_oci: OciConfig) -> list[str]:
    return sorted(
        f"{rule['type']} {rule['major']}:{rule['minor']} {rule['access']}"
        for rule in ring_oci["linux"]["resources"]["devices"]
        if rule["allow"] and "type" in rule and "major" in rule and "minor" in rule
    )


def _part_rows(host: Host, range_size: int) -> list[tuple[str, str, Value]]:
    """Say what the door, the gofer and the sentry are reduced to, each of them a process of the host's."""
    rows: list[tuple[str, str, Value]] = []
    # Without root the range is shorter, and its last id stands for the sentry's.
    sentry = SENTRY_ID if not host.rootless else range_size - 1
    for part, own_id, capabilities, filters in (
        ("sentry", sentry, (), 2),
        ("gofer", 0, GOFER_CAPABILITIES, 2),
        ("door", 0, (), 1),
    ):
        rows += [
            (f"{part}.credentials.uid", "user", own_id),
            (f"{part}.credentials.gid", "user", own_id),
            (f"{part}.credentials.range", "user", None),  # known of each sandbox alone
            *(
                (f"{part}.capabilities.{kind}", "capabilities", sorted(capabilities))
                for kind in ("permitted", "effective", "bounding")
            ),
            (f"{part}.no_new_privileges", "no_new_privileges", True),
            (f"{part}.seccomp.mode", "seccomp", "filter"),
            (f"{part}.seccomp.filters", "seccomp", filters),
            *(
                (f"{part}.namespace.{kind}", "user" if kind == "user" else "namespaces", "own")
                for kind in NAMESPACES
            ),
        ]
    rows.append(("sentry.program", "isolation", None))
    rows.append(("gofer.program", "isolation", None))
    # An empty root of its own: what has got out of the kernel inside finds no file of anybody's.
    rows.append(("sentry.mounts", "isolation", ["/ tmpfs ro"]))
    rows.append(("sentry.network.interfaces", "network.mode", ["lo"]))
    return rows


def notes(policy: Policy, workload: Workload) -> list[str]:
    """Return warnings: what the policy or the image needs and gVisor does not have."""
    found = warnings(policy, workload)
    if "CAP_SYS_PTRACE" in policy.capabilities or policy.seccomp not in OWN:
        found.append(
            f"{_TRACING}(2) is denied: in gVisor's kernel a tracer would get around the seccomp filter"
        )
    return found
