"""The enforceability table: which mechanism enforces each policy field on each tier here, or why none does.

This one table drives the refusals of a plan, ``doctor --matrix``, the proof and the documentation.
"""

from typing import Literal

import msgspec

from ringfence.host import machine, sentry
from ringfence.host import mechanisms as by
from ringfence.host.facts import Host
from ringfence.policy.model import Policy

Tier = Literal["linux", "gvisor", "microvm"]
TIERS: tuple[Tier, ...] = ("linux", "gvisor", "microvm")


class Enforcement(msgspec.Struct, frozen=True, kw_only=True):
    """One cell: the `mechanism` that enforces `field` on `tier`, or the `reason` why none and a `hint`."""

    field: str
    tier: Tier
    enforced: bool
    mechanism: str = ""
    reason: str = ""
    hint: str = ""


class _Row(msgspec.Struct, frozen=True):
    """How a field is enforced on each tier that is built."""

    linux: by.Cell
    gvisor: by.Cell
    microvm: by.Cell


def _same(cell: by.Cell) -> _Row:
    """What is decided outside of any sandbox, so that the tier makes no difference."""
    return _Row(cell, cell, cell)


def _ringed(cell: by.Cell, more: str = "") -> _Row:
    """What the ring around a kernel of its own keeps with the means of the linux tier."""
    return _Row(cell, sentry.around(cell, more), machine.around(cell))


_TABLE: dict[str, _Row] = {
    "isolation": _same(by.always("choice of the tier before anything starts")),
    "floor": _same(by.always("choice of the tier before anything starts")),
    "user": _Row(by.user, sentry.USER, machine.both("the job's user in its kernel", by.user)),
    "capabilities": _Row(
        by.always("capability sets: bounding, effective, permitted, inheritable, ambient"),
        sentry.both("capability sets of its kernel", by.always("none for the sentry")),
        machine.both("capability sets of its kernel", by.always("none for the VMM")),
    ),
    "no_new_privileges": _Row(
        by.always("prctl PR_SET_NO_NEW_PRIVS"),
        sentry.inside("set-user-ID bits and file capabilities give nothing"),
        machine.inside("prctl PR_SET_NO_NEW_PRIVS"),
    ),
    "seccomp": _Row(
        by.seccomp,
        sentry.SECCOMP,
        machine.both("seccomp filter in its kernel", by.seccomp, " of the ring, and the VMM's own"),
    ),
    "lsm": _Row(
        by.lsm,
        by.never(
            "a label would be that of gVisor's kernel, not the job's",
            "lsm: default goes without, or use -i linux",
        ),
        by.never("a label would be the VMM's, not the job's", "lsm: default goes without, or use -i linux"),
    ),
    "filesystem.root": _Row(
        by.namespace("mnt", "mount namespace, root read-only or a tmpfs over it"),
        sentry.staged("staged root, read-only or a tmpfs over it, served by the gofer"),
        machine.inside("erofs image, read-only or a tmpfs over it"),
    ),
    "filesystem.tmp": _Row(
        by.namespace("mnt", "tmpfs size="),
        sentry.staged("staged tmpfs size=, served by the gofer"),
        machine.inside("tmpfs size="),
    ),
    "filesystem.sysfs": _Row(
        by.namespace("mnt", "mount namespace, /sys not mounted or read-only"),
        sentry.inside("/sys of its own kernel or none, never the host's"),
        machine.inside("/sys of its own kernel or none, never the host's"),
    ),
    "filesystem.mounts": _Row(
        by.namespace("mnt", "mount namespace, bind mounts nosuid, nodev, ro or rw"),
        sentry.staged("staged bind mounts nosuid, nodev, ro or rw, served by the gofer"),
        machine.inside("copies on read-only disks, nosuid, nodev"),
    ),
    "network.mode": _Row(by.network, sentry.network, machine.network),
    "network.allow": _same(by.never("egress rules are not built yet", "network: {mode: none}")),
    "network.publish": _same(by.never("published ports are not built yet", "network: {mode: none}")),
    "devices": _Row(by.devices, sentry.devices, machine.devices),
    "limits.memory": _Row(
        by.control("memory", "memory.limit_in_bytes", "memory.max"),
        sentry.around(
            by.control("memory", "memory.limit_in_bytes", "memory.max"),
            ", with what the sentry itself uses on top",
        ),
        machine.both(
            "memory.max in its kernel",
            by.control("memory", "memory.limit_in_bytes", "memory.max"),
            ", the machine's memory and the VMM's",
        ),
    ),
    "limits.swap": _Row(by.swap, sentry.around(by.swap), machine.swap),
    "limits.cpus": _ringed(by.control("cpu", "cpu.cfs_quota_us", "cpu.max")),
    "limits.cpu_weight": _ringed(by.control("cpu", "cpu.shares", "cpu.weight")),
    "limits.cpuset": _ringed(by.cpuset),
    "limits.pids": _Row(
        by.control("pids", "pids.max", "pids.max"),
        sentry.pids(by.control("pids", "pids.max", "pids.max")),
        machine.inside("pids.max in its kernel"),
    ),
    "limits.stack": _Row(
        by.rlimit("stack"),
        sentry.inside("rlimit STACK in its kernel"),
        machine.inside("rlimit STACK in its kernel"),
    ),
    "limits.threads": _Row(by.threads, sentry.threads, machine.inside("rlimit NPROC in its kernel")),
    "limits.open_files": _Row(
        by.rlimit("nofile"),
        sentry.inside("rlimit NOFILE in its kernel"),
        machine.inside("rlimit NOFILE in its kernel"),
    ),
    "limits.file_size": _Row(
        by.rlimit("fsize"),
        sentry.inside("rlimit FSIZE in its kernel"),
        machine.inside("rlimit FSIZE in its kernel"),
    ),
    "limits.disk": _Row(
        by.namespace("mnt", "tmpfs size= (memory-backed work directory and writable root)"),
        sentry.staged("staged tmpfs size= (memory-backed work directory and writable root)"),
        machine.inside("tmpfs size= (memory-backed work directory and writable root)"),
    ),
    "limits.inodes": _Row(
        by.namespace("mnt", "tmpfs nr_inodes="),
        sentry.staged("staged tmpfs nr_inodes="),
        machine.inside("tmpfs nr_inodes="),
    ),
    "limits.shm": _Row(
        by.namespace("mnt", "tmpfs size= on /dev/shm"),
        sentry.staged("staged tmpfs size= on /dev/shm"),
        machine.inside("tmpfs size= on /dev/shm"),
    ),
    "limits.io.read": _ringed(by.io_read("bps")),
    "limits.io.write": _ringed(by.io_write("bps")),
    "limits.io.read_iops": _ringed(by.io_read("iops")),
    "limits.io.write_iops": _ringed(by.io_write("iops")),
    "limits.time": _same(by.always("host clock (poll deadline), and the agent's own")),
    "limits.output": _same(by.always("the host counts what it reads and stops there")),
    "sysctls": _Row(
        by.namespace("ipc", "namespaced kernel parameters, written before the start"),
        by.never("gVisor's kernel has few and passes over the rest", "leave sysctls empty, or use -i linux"),
        machine.inside("kernel parameters of its own kernel, written before the start"),
    ),
    "secrets": _same(by.never("secrets are not built yet", "leave the list empty")),
    "image.digest_required": _same(by.always("checked before the start, and before anything is fetched")),
    "image.allowed_registries": _same(by.always("checked before the start, and before anything is fetched")),
    "image.signatures": _same(by.always("checked by skopeo while the image is fetched (policy.json)")),
    "host.smt": _same(by.smt),
    "host.ksm": _same(by.ksm),
    "host.cpu_mitigations": _same(by.mitigations),
}
FIELDS: tuple[str, ...] = tuple(_TABLE)


def enforcement(
    field: str,
    tier: Tier,
    host: Host,
    *,
    value: object = None,
    writes_to_disk: bool = True,
    capabilities: tuple[str, ...] = (),
) -> Enforcement:
    """Return how `host` enforces policy `field` (dotted YAML key) on `tier`.

    `value` is the policy's value where it matters (rlimits, cpuset); None asks about the field in general.
    `writes_to_disk` says whether the policy has a writable mount, `capabilities` are those of the policy. Whether
    a tier can run here at all is not asked: see `ringfence.host.sentry.lack` and `ringfence.host.machine.lack`.
    Raises KeyError for an unknown field.
    """
    row = _TABLE[field]
    ask = by.Question(
        field=field, host=host, value=value, writes_to_disk=writes_to_disk, capabilities=capabilities
    )
    cell = {"linux": row.linux, "gvisor": row.gvisor, "microvm": row.microvm}[tier]
    return _told(field, tier, cell(ask))


def _told(field: str, tier: Tier, answer: by.Answer) -> Enforcement:
    return Enforcement(
        field=field,
        tier=tier,
        enforced=not answer.reason,
        mechanism=answer.mechanism,
        reason=answer.reason,
        hint=answer.hint,
    )


def matrix(host: Host, *, writes_to_disk: bool = True) -> tuple[Enforcement, ...]:
    """Return every cell of the table for `host`, field by field, tiers in order.

    Where a tier cannot be used at all, each cell of its column says why.
    """
    lacks = {"gvisor": sentry.lack(host), "microvm": machine.lack(host)}
    lacking = {tier: lack for tier, lack in lacks.items() if lack is not None}
    return tuple(
        _told(field, tier, lacking[tier])
        if tier in lacking
        else enforcement(field, tier, host, writes_to_disk=writes_to_disk)
        for field in FIELDS
        for tier in TIERS
    )


def refusals(
    policy: Policy, tier: Tier, host: Host, allow_unenforced: frozenset[str] = frozenset()
) -> list[Enforcement]:
    """Return the fields that `policy` really asks for and that nothing enforces here, in the table's order.

    Fields in `allow_unenforced` are left out; a plan raises NotEnforceable for the rest.
    """
    disk = writes_to_disk(policy)
    found = [
        enforcement(field, tier, host, value=value, writes_to_disk=disk, capabilities=policy.capabilities)
        for field, value in leaves(policy).items()
        if asks(field, value)
    ]
    return [cell for cell in found if not cell.enforced and cell.field not in allow_unenforced]


def asks(field: str, value: object) -> bool:
    """Whether `value` of a policy `field` asks for anything that has to be enforced."""
    if field == "lsm":  # "default" is content with a host that has none
        return value == "required"
    return value is not None and value is not False and value not in ((), {})


def writes_to_disk(policy: Policy) -> bool:
    """Whether the workload can write to a disk: work directory, /tmp and a writable root are tmpfs."""
    return any(mount.mode == "rw" for mount in policy.filesystem.mounts)


def leaves(policy: Policy) -> dict[str, object]:
    """Return {dotted YAML key: value} of every field of `policy`; lists and mappings are one value."""
    return dict(_leaves(policy, ""))


def _leaves(part: msgspec.Struct, prefix: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for field in msgspec.structs.fields(part):
        name, value = prefix + field.encode_name, getattr(part, field.name)
        found += _leaves(value, f"{name}.") if isinstance(value, msgspec.Struct) else [(name, value)]
    return found
