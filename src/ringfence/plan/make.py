"""policy + workload + host -> plan. Pure: the same inputs give the same bytes."""

import msgspec

from ringfence.errors import HostError, NotEnforceable
from ringfence.host.enforce import Enforcement, Tier, enforcement, leaves, refusals, writes_to_disk
from ringfence.host.facts import Host, Runtime, host_digest
from ringfence.plan import gvisor, microvm
from ringfence.plan.config import RANGE_SIZE, config, config_controls
from ringfence.plan.document import FORMAT, Control, FilterSample, Guest, Machine, Op, Plan
from ringfence.plan.limits import Disks, cgroup_controls, rlimit_controls
from ringfence.plan.oci import OciConfig
from ringfence.plan.seccomp import seccomp_for
from ringfence.plan.seccomp_match import LinuxSeccomp
from ringfence.plan.seccomp_samples import samples
from ringfence.plan.stage import WORK, stage, stage_controls
from ringfence.plan.workload import Workload
from ringfence.policy.digest import digest as policy_digest
from ringfence.policy.model import TIERS, Policy, user_ids

_JOB = (1000, 1000)
# A user's subordinate ids are usually 65,536 in all: sixteen sandboxes at once, with the ids that images use.
_ROOTLESS_RANGE = 4096
_LINUX_RUNTIMES = ("crun", "runc")
# runc lets every container open /dev/net/tun, whatever the spec says, and no spec can take it back:
# https://github.com/opencontainers/runc/blob/v1.1.5/libcontainer/specconv/spec_linux.go (AllowedDevices)
_TUN = "c 10:200"


def make_plan(
    policy: Policy,
    workload: Workload,
    host: Host,
    *,
    runtime: str | None = None,
    platform: str = "",
    emulation: bool = False,
    vmm: str = "",
    allow_unenforced: frozenset[str] = frozenset(),
) -> Plan:
    """Decide everything, or refuse.

    `runtime` is "crun", "runc" or None for the first that works here; `platform` is gVisor's, "" for the best;
    `emulation` lets a microVM do without KVM, `vmm` is what makes it, "qemu" ("") or "firecracker";
    `allow_unenforced` are dotted policy fields that may go unenforced.
    Raises NotEnforceable, HostError, PolicyError, MountError.
    """
    tier = choose_tier(policy)
    accelerator = ""
    if tier == "gvisor":
        platform = gvisor.choose_platform(host, platform)
        gvisor.check(policy, workload)
    elif platform:
        raise HostError(
            f"the {tier} tier has no platform {platform!r}", hint="--gvisor-platform goes with -i gvisor"
        )
    if tier == "microvm":
        accelerator = microvm.choose_accelerator(host, emulation=emulation, vmm=vmm)
        microvm.check(policy, workload)
    elif vmm:
        raise HostError(f"the {tier} tier has no VMM {vmm!r}", hint="--vmm goes with -i microvm")
    unenforced = _refuse(policy, workload, tier, host, allow_unenforced)
    skip = frozenset(cell.field for cell in unenforced)
    program_name, program = _runtime(host, runtime)
    range_size = _range_size(host, skip)
    if tier != "linux" and not range_size:
        raise HostError(
            f"the {tier} tier needs ids of its own",
            hint="usermod --add-subuids and --add-subgids give a user ranges",
        )
    # Without root the last id of a range stands for gVisor's sentry.
    user = _user(policy, workload, range_size - 1 if tier == "gvisor" and host.rootless else range_size)
    _ready(host, user, skip)
    _devices(policy, host)
    seccomp = seccomp_for(
        policy.seccomp,
        arch=host.arch,
        capabilities=policy.capabilities,
        moby=workload.moby,
        kernel=host.kernel,
    )
    disks = Disks(workload.disks, writes_to_disk(policy))
    ops = stage(policy, workload, host)
    limited = host.cgroup.writable and host.cgroup.version != "none"
    make_parts = {"linux": _linux, "gvisor": _gvisor, "microvm": _microvm}[tier]
    parts = make_parts(
        _Given(
            policy=policy,
            workload=workload,
            host=host,
            user=user,
            range_size=range_size,
            seccomp=seccomp.oci,
            disks=disks,
            ops=ops,
            limited=limited,
            skip=skip,
            platform=accelerator if tier == "microvm" else platform,
            vmm=vmm,
        )
    )
    plan: Plan = {
        "format": FORMAT,
        "isolation": tier,
        "rootless": host.rootless,
        "runtime": {"name": program_name, "path": program.path, "version": program.version_text},
        "image": {
            "name": workload.image,
            "digest": workload.image_digest,
            "record": workload.image_record,
        },
        "policy_digest": policy_digest(policy),
        "host_digest": host_digest(host),
        "user": {"uid": user[0], "gid": user[1], "range_size": range_size},
        "entrypoint": list(workload.start.entrypoint),
        "command": list(workload.start.command),
        "env": [f"HOME={WORK}", *workload.env],
        "cwd": workload.start.cwd or WORK,
        "stop_signal": workload.start.stop_signal,
        "time_s": policy.limits.time_s,
        "output_bytes": policy.limits.output_bytes,
        "cgroup": _layout(host),
        "cgroup_limits": limited,
        "deny_devices": _take_back(workload) if program_name == "runc" and limited else [],
        "stage": parts.ops,
        "oci": parts.oci,
        "guest": parts.guest,
        "machine": parts.machine,
        "controls": parts.controls,
        "filter_samples": parts.samples,
        "unenforced": [
            {"field": cell.field, "reason": cell.reason}
            for cell in (
                *unenforced,
                *_label(policy, tier, host),
                *_emulated(tier, accelerator, host),
                *_written_over(policy, tier, host, skip),
            )
        ],
        "warnings": _warnings(policy, workload, tier),
        "summary": [f"seccomp {seccomp.summary}"],
    }
    plan["digest"] = plan_digest(plan)
    return plan


class _Given(msgspec.Struct, frozen=True, kw_only=True):
    """What the parts of a plan are made from, all of it decided."""

    policy: Policy
    workload: Workload
    host: Host
    user: tuple[int, int]
    range_size: int
    seccomp: LinuxSeccomp
    disks: Disks
    ops: list[Op]
    limited: bool
    skip: frozenset[str]
    platform: str
    vmm: str


class _Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What differs from tier to tier."""

    ops: list[Op]
    oci: OciConfig
    guest: Guest | None = None
    machine: Machine | None = None
    controls: list[Control]
    samples: list[FilterSample]


def _linux(given: _Given) -> _Parts:
    policy, host, skip = given.policy, given.host, given.skip
    oci = config(
        policy,
        given.workload,
        host,
        user=given.user,
        range_size=given.range_size,
        seccomp=given.seccomp,
        disks=given.disks,
        skip=skip,
    )
    # Only root may read a filter back from the kernel.
    tried, answers = ([], []) if host.rootless else samples(given.seccomp, host.arch)
    groups = cgroup_controls(policy.limits, host, disks=given.disks, skip=skip) if given.limited else []
    controls: list[Control] = [
        *config_controls(policy, given.workload, oci, host, skip),
        *([{"name": "seccomp.answers", "field": "seccomp", "asked": answers}] if tried else ()),
        *rlimit_controls(policy.limits, skip),
        *groups,
        *stage_controls(given.ops),
    ]
    return _Parts(ops=given.ops, oci=oci, controls=controls, samples=tried)


def _gvisor(given: _Given) -> _Parts:
    policy, host, skip = given.policy, given.host, given.skip
    oci = gvisor.ring(
        policy,
        host,
        platform=given.platform,
        range_size=given.range_size,
        disks=given.disks,
        skip=skip,
    )
    made = gvisor.guest(
        policy,
        host,
        platform=given.platform,
        user=given.user,
        seccomp=given.seccomp,
        ops=given.ops,
        skip=skip,
    )
    controls = gvisor.controls(
        policy,
        host,
        made,
        oci,
        given.ops,
        range_size=given.range_size,
        disks=given.disks,
        limited=given.limited,
        skip=skip,
    )
    ops = gvisor.ring_stage(given.ops, host, policy.limits, made)
    return _Parts(ops=ops, oci=oci, guest=made, controls=controls, samples=[])


def _microvm(given: _Given) -> _Parts:
    policy, host, skip = given.policy, given.host, given.skip
    made = microvm.machine(
        policy,
        given.workload,
        host,
        accelerator=given.platform,
        user=given.user,
        seccomp=given.seccomp,
        ops=given.ops,
        skip=skip,
        vmm=given.vmm,
    )
    oci = microvm.ring(
        policy,
        host,
        accelerator=given.platform,
        user=given.user,
        range_size=given.range_size,
        disks=given.disks,
        skip=skip,
    )
    controls = microvm.controls(
        policy,
        host,
        made,
        given.ops,
        user=given.user,
        disks=given.disks,
        limited=given.limited,
        skip=skip,
    )
    ops = microvm.ring_stage(host, made, policy.limits)
    return _Parts(ops=ops, oci=oci, machine=made, controls=controls, samples=[])


def plan_digest(plan: Plan) -> str:
    """Return "sha256:..." of the plan's canonical JSON without its own digest."""
    import hashlib

    body = {key: value for key, value in plan.items() if key != "digest"}
    return "sha256:" + hashlib.sha256(msgspec.json.encode(body, order="deterministic")).hexdigest()


def choose_tier(policy: Policy) -> Tier:
    """Return the tier: the one that the policy names, or for ``auto`` the cheapest at or above its floor.

    Raises HostError when that tier is not there: never a weaker one instead.
    """
    wanted: Tier = policy.floor if policy.isolation == "auto" else policy.isolation
    if TIERS.index(wanted) < TIERS.index(policy.floor):
        raise HostError(f"isolation {wanted} is below the policy's floor {policy.floor}")
    return wanted


def _refuse(
    policy: Policy, workload: Workload, tier: Tier, host: Host, allow_unenforced: frozenset[str]
) -> list[Enforcement]:
    """Return the unenforced fields that the user let pass; raise for all others."""
    missing = refusals(policy, tier, host)
    known = {cell.field for cell in missing}
    missing += [cell for cell in _not_on_a_disk(policy, workload, tier) if cell.field not in known]
    missing += [cell for cell in _fills_dev(policy, workload, tier) if cell.field not in known]
    refused = [cell for cell in missing if cell.field not in allow_unenforced]
    if refused:
        first, fields = refused[0], tuple(cell.field for cell in refused)
        more = f" (and {', '.join(fields[1:])})" if len(fields) > 1 else ""
        raise NotEnforceable(
            f"{first.field} cannot be enforced at the {tier} tier: {first.reason}{more}",
            fields=fields,
            hint=f"{first.hint}; or accept it with --allow-unenforced {','.join(fields)}",
        )
    return missing


def _not_on_a_disk(policy: Policy, workload: Workload, tier: Tier) -> list[Enforcement]:
    """Return the I/O limits that do not hold for a path whose disk is not known."""
    if not workload.unknown_disks:
        return []
    limits = leaves(policy)
    return [
        Enforcement(
            field=field,
            tier=tier,
            enforced=False,
            reason=f"{workload.unknown_disks[0]} lies on no disk that could be throttled",
            hint="copy it to a local disk",
        )
        for field in ("limits.io.read", "limits.io.write", "limits.io.read_iops", "limits.io.write_iops")
        if limits[field] is not None
    ]


def _fills_dev(policy: Policy, workload: Workload, tier: Tier) -> list[Enforcement]:
    """Return the limits on files that do not hold for root of a gVisor sandbox: its /dev has no size."""
    user = user_ids(policy.user) or workload.start.user or _JOB
    if tier != "gvisor" or user[0] != 0:
        return []
    return [
        Enforcement(
            field=field,
            tier=tier,
            enforced=False,
            reason="root of the sandbox can write to gVisor's /dev, which memory alone bounds",
            hint="another --user",
        )
        for field in ("limits.disk", "limits.inodes")
    ]


def _runtime(host: Host, wanted: str | None) -> tuple[str, Runtime]:
    names = (wanted,) if wanted else _LINUX_RUNTIMES
    if host.rootless and host.cgroup.hybrid_v2_mount:
        # crun refuses hybrid cgroups, and a user cannot take the second mount out of its sight.
        if wanted == "crun":
            raise HostError(
                "crun does not run for a user on a host with hybrid cgroups", hint="--runtime runc"
            )
        names = ("runc",)
    for name in names:
        if name not in _LINUX_RUNTIMES:
            raise HostError(f"unknown runtime {name!r}", hint=f"one of: {', '.join(_LINUX_RUNTIMES)}")
        if name in host.runtimes:
            return name, host.runtimes[name]
    raise HostError(
        f"{' or '.join(names)} is not installed", hint=f"apt-get install {names[0]}, then 'ringfence doctor'"
    )


def _ready(host: Host, user: tuple[int, int], skip: frozenset[str]) -> None:
    if not host.overlayfs:
        raise HostError("the kernel has no overlayfs", hint="modprobe overlay")
    if not host.rootless and not host.idmapped_mounts:
        raise HostError(
            f"images on {host.state_filesystem or 'this file system'} cannot be mounted with their owners mapped",
            hint="set RINGFENCE_STATE_DIR to a directory on ext4, xfs, btrfs or a tmpfs of Linux 6.3",
        )
    if host.rootless and 0 in user and "user" not in skip:
        raise HostError("user 0 of a sandbox started without root would be yourself", hint="another --user")
    if "user" in skip and not host.rootless:
        raise HostError("without user namespaces nothing here can run as root", hint="enable them")


def _devices(policy: Policy, host: Host) -> None:
    """Refuse an access to a device that is less than its node allows where no devices cgroup can see to that."""
    for device in policy.devices if host.rootless else ():
        path, _, access = device.partition(":")
        if access == "r":
            raise HostError(
                f"{path} cannot be given read-only to a sandbox started without root", hint=f"{path}:rw"
            )


def _user(policy: Policy, workload: Workload, range_size: int) -> tuple[int, int]:
    """Return the job's ids inside, which must be in its range; without a range the caller's own id is 0 inside.

    An image may name the user, but root only the policy can.
    """
    wanted = user_ids(policy.user)
    if range_size == 0:
        if wanted is not None:
            raise HostError(
                f"user {policy.user} needs subordinate ids; without them the job has your own id, as 0",
                hint="leave user: dedicated, or get ids: usermod --add-subuids and --add-subgids",
            )
        return (0, 0)
    if wanted is not None and max(wanted) >= range_size:
        raise HostError(
            f"user {policy.user} is beyond the {range_size} ids of a sandbox started without root",
            hint=f"an id below {range_size}, or run as root",
        )
    own = workload.start.user
    if wanted is None and own is not None and max(own) >= range_size:
        raise HostError(
            f"the image's user {own[0]}:{own[1]} is beyond the {range_size} ids of a sandbox started without root",
            hint="choose one: --user UID:GID",
        )
    return wanted or own or _JOB


def _range_size(host: Host, skip: frozenset[str]) -> int:
    if not host.rootless:
        return RANGE_SIZE
    return 0 if "user" in skip else _ROOTLESS_RANGE


def _take_back(workload: Workload) -> list[str]:
    """Return what of runc's own device the policy does not give."""
    given = "".join(
        source.rule.split()[2] for source in workload.sources if source.rule.startswith(_TUN + " ")
    )
    missing = "".join(access for access in "rwm" if access not in given)
    return [f"{_TUN} {missing}"] if missing else []


def _layout(host: Host) -> dict[str, object]:
    facts = host.cgroup
    return {
        "version": facts.version,
        "mounts": facts.mounts,
        "unified": facts.unified,
        "controllers": list(facts.controllers),
        "base": facts.base,
    }


def _warnings(policy: Policy, workload: Workload, tier: Tier) -> list[str]:
    if tier == "gvisor":
        return gvisor.notes(policy, workload)
    return microvm.notes(policy) if tier == "microvm" else []


def _written_over(policy: Policy, tier: Tier, host: Host, skip: frozenset[str]) -> list[Enforcement]:
    """Return the limits on writes that cgroup v2 keeps in part alone: said in the proof, since nothing is refused."""
    if host.cgroup.version != "v2" or not writes_to_disk(policy):
        return []
    asked = leaves(policy)
    reason = "in part: cgroup v2 charges a write over pages that another group has cached to that group"
    return [
        Enforcement(field=field, tier=tier, enforced=False, reason=reason)
        for field in ("limits.io.write", "limits.io.write_iops")
        if asked[field] is not None and field not in skip
    ]


def _emulated(tier: Tier, accelerator: str, host: Host) -> list[Enforcement]:
    """Return that no hardware keeps the machine apart, where emulation was allowed and KVM does not work."""
    if tier != "microvm" or accelerator == "kvm":
        return []
    reason = f"no hardware boundary: the machine is emulated ({host.kvm_reason or 'KVM does not work here'})"
    return [Enforcement(field="isolation", tier=tier, enforced=False, reason=reason)]


def _label(policy: Policy, tier: Tier, host: Host) -> list[Enforcement]:
    """Return the label that the job goes without although the host could give one, which `lsm: default` allows."""
    if policy.lsm == "default" and host.lsm.apparmor and not host.lsm.apparmor_profile:
        return [enforcement("lsm", tier, host)]
    return []
