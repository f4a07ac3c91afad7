"""The policy: everything a workload may do, as frozen data with one value for each field.

The YAML keys are the contract with users; an attribute whose value has a unit ends in that unit, so a file's
``limits.memory`` is `Limits.memory_bytes` here. Nothing has a default in code: the preset ``untrusted`` is
complete, and a file without ``extends`` starts from it. Values are canonical, as `ringfence.policy.load`
makes them: capabilities as ``CAP_X`` in the kernel's order, paths absolute and normal, addresses and ports
written out.

``None`` in a limit means that the policy asks for no limit of its own.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Isolation = Literal["auto", "linux", "gvisor", "microvm"]
Floor = Literal["linux", "gvisor", "microvm"]

# From the weakest boundary to the strongest: `floor` and the diff compare by position.
TIERS: tuple[Floor, ...] = ("linux", "gvisor", "microvm")


class Mount(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One bind mount of a host path; always nosuid, nodev and private."""

    source: str  # absolute host path
    target: str  # absolute path inside
    mode: Literal["ro", "rw"] = "ro"
    # The user's own words that `source` may be /, /proc, a runtime socket or a device.
    allow_dangerous: bool = False


class Filesystem(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the workload sees and may write."""

    root: Literal["read-only", "writable"]
    tmp_bytes: int = msgspec.field(name="tmp")  # size of the tmpfs on /tmp
    sysfs: bool  # whether /sys is mounted (read-only) at all
    mounts: tuple[Mount, ...]


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the workload may reach and who may reach it."""

    mode: Literal["none", "egress", "ports"]
    allow: tuple[str, ...]  # "name:port", "10.1.0.0/16:5432" or "[2001:db8::/32]:443"
    publish: tuple[str, ...]  # "127.0.0.1:8080:80/tcp": host address, host port, port inside


class Io(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Block I/O limits for each device that the workload's files live on."""

    read_bytes_per_s: int | None = msgspec.field(name="read")
    write_bytes_per_s: int | None = msgspec.field(name="write")
    read_iops: int | None
    write_iops: int | None


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much of the machine the workload may use."""

    memory_bytes: int | None = msgspec.field(name="memory")
    swap_bytes: int | None = msgspec.field(name="swap")  # beyond memory_bytes; 0 is none
    cpus: float | None
    cpu_weight: int  # 1..10000, the scale of cgroup v2's cpu.weight
    cpuset: str | None  # "0-1,4"; None is every CPU
    pids: int | None  # processes and threads in the sandbox's cgroup
    stack_bytes: int = msgspec.field(name="stack")
    threads: int | None  # RLIMIT_NPROC of the sandbox's own uid
    open_files: int
    file_size_bytes: int | None = msgspec.field(name="file_size")
    disk_bytes: int = msgspec.field(name="disk")  # work directory and writable root
    inodes: int
    shm_bytes: int = msgspec.field(name="shm")  # size of the tmpfs on /dev/shm
    io: Io
    time_s: float | None = msgspec.field(name="time")
    output_bytes: int | None = msgspec.field(name="output")  # stdout and stderr together


class ImageRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which images may be run at all."""

    digest_required: bool
    allowed_registries: tuple[str, ...] | None  # "host[:port][/path]" or "local"; None is every image
    signatures: str | None  # absolute path of a policy.json of containers/image; None is the host's own


class HostRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the host itself must be like before this workload may run on it."""

    smt: Literal["allowed", "refused"]
    ksm: Literal["allowed", "refused"]
    cpu_mitigations: Literal["any", "required"]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole resolved policy."""

    isolation: Isolation
    floor: Floor
    user: str  # "dedicated", or "UID:GID" inside the sandbox
    capabilities: tuple[str, ...]
    no_new_privileges: bool
    seccomp: str  # "default", "strict" or the absolute path of a moby-format JSON file
    lsm: Literal["default", "none", "required"]
    filesystem: Filesystem
    network: Network
    devices: tuple[str, ...]  # "/dev/fuse:rw": absolute path and r, rw or rwm
    limits: Limits
    sysctls: dict[str, str]
    secrets: tuple[str, ...]  # empty until secrets are built
    image: ImageRules
    host: HostRules


def user_ids(user: str) -> tuple[int, int] | None:
    """Return (uid, gid) inside the sandbox for a policy's canonical `user`, or None for ``dedicated``."""
    if user == "dedicated":
        return None
    uid, gid = user.split(":")
    return int(uid), int(gid)
