"""Firecracker as the VMM of the microVM tier: what it is refused for, and the document that it builds its machine from.

The document is a file of the ring; nothing is said to Firecracker afterwards, and its API is off. Its words are those
of the API, of which it is all the requests of a boot in one.
Source: https://github.com/firecracker-microvm/firecracker/blob/main/docs/getting-started.md, "configuration file", and
the API's published definition, which tests hold the document against.
"""

from typing import NotRequired, TypedDict

from ringfence.errors import HostError
from ringfence.host.facts import Host
from ringfence.plainjson import dumps
from ringfence.plan.document import Disk, Machine, Op
from ringfence.policy.model import Io

NAME = "firecracker"
# The first with virtio-rng, without which a guest has no randomness of its own but the host's.
LEAST = (1, 4, 0)
MOST_CPUS = 32
CHANNELS = ("serial console", "vsock link")
# The first of the descriptors that the bridge leaves to the VMM: ringfence.runtime.bridge.
FIRST_DISK = 8
_MIB = 1 << 20
_DOCUMENT = "machine.json"
# Where the VMM, which is nobody of note in its ring, may write: its socket and its metrics, and no more than this.
_RUN, _RUN_BYTES, _RUN_INODES = "run", _MIB, 8
VSOCK = f"/{_RUN}/vsock"
METRICS = f"/{_RUN}/metrics"
# The same in all machines: it names a guest to its own VMM, whose socket is in a ring of its own.
GUEST_CID = 3
_SECOND_MS = 1000


class TokenBucket(TypedDict):
    """So much in so many milliseconds: bytes, or operations."""

    size: int
    refill_time: int


class RateLimiter(TypedDict, total=False):
    """Limits on one device."""

    bandwidth: TokenBucket
    ops: TokenBucket


class Drive(TypedDict):
    """A block device; the first one is vda."""

    drive_id: str
    path_on_host: str
    is_root_device: bool
    is_read_only: bool
    cache_type: str
    io_engine: str
    rate_limiter: NotRequired[RateLimiter]


class BootSource(TypedDict):
    """A kernel, its first file system and its command line."""

    kernel_image_path: str
    initrd_path: str
    boot_args: str


class MachineConfig(TypedDict):
    """CPUs and memory."""

    vcpu_count: int
    mem_size_mib: int
    smt: bool
    track_dirty_pages: bool


class Vsock(TypedDict):
    """The device that the link goes through; `uds_path` is the socket that the VMM makes."""

    guest_cid: int
    uds_path: str


class Logger(TypedDict, total=False):
    """What is logged, and where to: standard output without a path."""

    level: str
    log_path: str
    show_level: bool
    show_log_origin: bool


class Metrics(TypedDict):
    """The file that counters are written to."""

    metrics_path: str


class Entropy(TypedDict, total=False):
    """A virtio-rng device."""

    rate_limiter: RateLimiter


# The whole machine, in the words of the configuration file.
Document = TypedDict(
    "Document",
    {
        "boot-source": BootSource,
        "drives": list[Drive],
        "machine-config": MachineConfig,
        "vsock": Vsock,
        "entropy": Entropy,
        "logger": Logger,
        "metrics": Metrics,
    },
)


def check_host(host: Host, *, emulation: bool) -> None:
    """Raise HostError where Firecracker cannot run: it is missing, too old or not ours to trust, or KVM does not work.

    `emulation` makes no difference but to the words: it has none.
    """
    runtime, facts = host.runtimes.get(NAME), host.vmm
    if runtime is None or facts is None:
        raise HostError(
            "Firecracker is not installed",
            hint="put 'firecracker' of one of its releases into /usr/local/bin; or --vmm qemu",
        )
    if runtime.version < LEAST:
        raise HostError(
            f"{runtime.version_text or 'this Firecracker'} is too old",
            hint=f"{'.'.join(map(str, LEAST))} or newer; or --vmm qemu",
        )
    if facts.reason:
        raise HostError(f"Firecracker cannot be used here: {facts.reason}", hint="see 'ringfence doctor'")
    if host.kvm != "works":
        instead = "--vmm qemu can emulate" if emulation else "-i gvisor needs no KVM"
        raise HostError(
            "Firecracker cannot emulate, and KVM does not work here: "
            + (host.kvm_reason or f"/dev/kvm is {host.kvm}"),
            hint=instead,
        )
    if host.rootless:
        raise HostError(
            "Firecracker opens its disks by name, which only root can arrange",
            hint="run as root, or --vmm qemu",
        )


def command(program: str) -> list[str]:
    """Return Firecracker's command line: no API, so that there is one thing less to take over."""
    return [program, "--no-api", "--config-file", f"/{_DOCUMENT}"]


def document(machine: Machine, io: Io) -> Document:
    """Return the document for `machine`, whose disks are all read-only; `io` are the policy's limits for each."""
    return {
        "boot-source": {
            "kernel_image_path": "/kernel",
            "initrd_path": "/initrd",
            "boot_args": machine["command_line"],
        },
        "drives": [_drive(place, disk, io) for place, disk in enumerate(machine["disks"])],
        "machine-config": {
            "vcpu_count": machine["cpus"],
            "mem_size_mib": machine["memory_bytes"] // _MIB,
            "smt": False,
            "track_dirty_pages": False,
        },
        "vsock": {"guest_cid": GUEST_CID, "uds_path": VSOCK},
        "entropy": {},
        "logger": {"level": "Warning", "show_level": True, "show_log_origin": False},
        "metrics": {"metrics_path": METRICS},
    }


def boot_args(cmdline: str) -> str:
    """Return the guest's command line.

    Firecracker ends when the guest resets it by the keyboard controller, of which it has no more than that. The serial
    port is there in any case; the kernel says on it why it panics, and else nothing.
    """
    words = "reboot=k panic=-1 quiet console=ttyS0 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
    return f"{words} ringfence.link=vsock {cmdline}".strip()


def _drive(place: int, disk: Disk, io: Io) -> Drive:
    # What is made when the sandbox starts has no name, but a number among the descriptors that the VMM is given.
    named = disk["kind"] == "image"
    found: Drive = {
        "drive_id": disk["device"],
        "path_on_host": _at(disk) if named else f"/proc/self/fd/{FIRST_DISK + place}",
        "is_root_device": False,  # it would put words of its own on the kernel's command line
        "is_read_only": True,
        "cache_type": "Unsafe",
        "io_engine": "Sync",
    }
    limiter = rate_limiter(io)
    if limiter:
        found["rate_limiter"] = limiter
    return found


def rate_limiter(io: Io) -> RateLimiter:
    """Return the policy's limits on reading: nothing can be written."""
    found: RateLimiter = {}
    if io.read_bytes_per_s is not None:
        found["bandwidth"] = {"size": io.read_bytes_per_s, "refill_time": _SECOND_MS}
    if io.read_iops is not None:
        found["ops"] = {"size": io.read_iops, "refill_time": _SECOND_MS}
    return found


def _at(disk: Disk) -> str:
    return f"/disks/{disk['device']}"


def ring_stage(machine: Machine, io: Io) -> list[Op]:
    """Return what the ring has for Firecracker beside its program, the kernel and the first file system."""
    ops: list[Op] = [
        {"op": "file", "at": _DOCUMENT, "text": dumps(document(machine, io)), "mode": 0o444},
        {"op": "directory", "at": _RUN, "mode": 0o700, "owner": "job"},
        {
            "op": "tmpfs",
            "at": _RUN,
            "size_bytes": _RUN_BYTES,
            "inodes": _RUN_INODES,
            "mode": 0o700,
            "owner": "job",
        },
        # It opens this file and does not make it.
        {"op": "file", "at": METRICS.removeprefix("/"), "text": "", "mode": 0o666},
    ]
    for disk in machine["disks"]:
        if disk["kind"] == "image":
            ops += _shown(disk)
    return ops


def _shown(disk: Disk) -> list[Op]:
    """Show the ring a disk image of the store, which only its owner may read, as the VMM's own."""
    at = _at(disk).removeprefix("/")
    return [
        {"op": "directory", "at": "disks", "mode": 0o755, "owner": "root"},
        {"op": "file", "at": at, "text": "", "mode": 0o444},
        {
            "op": "bind",
            "source": disk["source"],
            "at": at,
            "below": "stage",
            "kind": "file",
            "ids": "owner",
            "read_only": True,
        },
    ]
