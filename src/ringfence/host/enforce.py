"""The enforceability table: which mechanism enforces each policy field on each tier here, or why none does.

This one table drives the refusals of a plan, ``doctor --matrix``, the proof and the documentation.
"""

from typing import Literal

import msgspec

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


_TABLE: dict[str, by.Cell] = {
    "isolation": by.always("choice of the tier before anything starts"),
    "floor": by.always("choice of the tier before anything starts"),
    "user": by.user,
    "capabilities": by.always("capability sets: bounding, effective, permitted, inheritable, ambient"),
    "no_new_privileges": by.always("prctl PR_SET_NO_NEW_PRIVS"),
    "seccomp": by.seccomp,
    "lsm": by.lsm,
    "filesystem.root": by.namespace("mnt", "mount namespace, root read-only or a tmpfs over it"),
    "filesystem.tmp": by.namespace("mnt", "tmpfs size="),
    "filesystem.sysfs": by.namespace("mnt", "mount namespace, /sys not mounted or read-only"),
    "filesystem.mounts": by.namespace("mnt", "mount namespace, bind mounts nosuid, nodev, ro or rw"),
    "network.mode": by.network,
    "network.allow": by.never("egress rules are not built yet", "network: {mode: none}"),
    "network.publish": by.never("published ports are not built yet", "network: {mode: none}"),
    "devices": by.devices,
    "limits.memory": by.control("memory", "memory.limit_in_bytes", "memory.max"),
    "limits.swap": by.swap,
    "limits.cpus": by.control("cpu", "cpu.cfs_quota_us", "cpu.max"),
    "limits.cpu_weight": by.control("cpu", "cpu.shares", "cpu.weight"),
    "limits.cpuset": by.cpuset,
    "limits.pids": by.control("pids", "pids.max", "pids.max"),
    "limits.stack": by.rlimit("stack"),
    "limits.threads": by.threads,
    "limits.open_files": by.rlimit("nofile"),
    "limits.file_size": by.rlimit("fsize"),
    "limits.disk": by.namespace("mnt", "tmpfs size= (memory-backed work directory and writable root)"),
    "limits.inodes": by.namespace("mnt", "tmpfs nr_inodes="),
    "limits.shm": by.namespace("mnt", "tmpfs size= on /dev/shm"),
    "limits.io.read": by.io_read("bps"),
    "limits.io.write": by.io_write("bps"),
    "limits.io.read_iops": by.io_read("iops"),
    "limits.io.write_iops": by.io_write("iops"),
    "limits.time": by.always("host clock (poll deadline), and the agent's own"),
    "limits.output": by.always("the host counts what it reads and stops there"),
    "sysctls": by.namespace("ipc", "namespaced kernel parameters, written before the start"),
    "secrets": by.never("secrets are not built yet", "leave the list empty"),
    "image.digest_required": by.always("checked before the start, and before anything is fetched"),
    "image.allowed_registries": by.always("checked before the start, and before anything is fetched"),
    "image.signatures": by.always("checked by skopeo while the image is fetched (policy.json)"),
    "host.smt": by.smt,
    "host.ksm": by.ksm,
    "host.cpu_mitigations": by.mitigations,
}
FIELDS: tuple[str, ...] = tuple(_TABLE)


def enforcement(
    field: str, tier: Tier, host: Host, *, value: object = None, writes_to_disk: bool = True
) -> Enforcement:
    """Return how `host` enforces policy `field` (dotted YAML key) on `tier`.

    `value` is the policy's value where it matters (rlimits, cpuset); None asks about the field in general.
    `writes_to_disk` says whether the policy has a writable mount. Raises KeyError for an unknown field.
    """
    cell = _TABLE[field]
    if tier != "linux":
        answer = by.Answer(reason=f"the {tier} tier is not built yet", hint="use -i linux")
    else:
        answer = cell(by.Question(field=field, host=host, value=value, writes_to_disk=writes_to_disk))
    return Enforcement(
        field=field,
        tier=tier,
        enforced=not answer.reason,
        mechanism=answer.mechanism,
        reason=answer.reason,
        hint=answer.hint,
    )


def matrix(host: Host, *, writes_to_disk: bool = True) -> tuple[Enforcement, ...]:
    """Return every cell of the table for `host`, field by field, tiers in order."""
    return tuple(
        enforcement(field, tier, host, writes_to_disk=writes_to_disk) for field in FIELDS for tier in TIERS
    )


def refusals(
    policy: Policy, tier: Tier, host: Host, allow_unenforced: frozenset[str] = frozenset()
) -> list[Enforcement]:
    """Return the fields that `policy` really asks for and that nothing enforces here, in the table's order.

    Fields in `allow_unenforced` are left out; a plan raises NotEnforceable for the rest.
    """
    disk = writes_to_disk(policy)
    found = [
        enforcement(field, tier, host, value=value, writes_to_disk=disk)
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
