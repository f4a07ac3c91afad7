"""Machines saved right after their boot, below the state directory. On the way of every run at the microVM tier.

snapshots/KEY.state     what QEMU wrote: the memory and the devices of a guest that waits for a bridge
snapshots/KEY.record    lines "NAME VALUE": what it is, and what the file was when it was made
snapshots/KEY.failed    why none could be made lately
snapshots/KEY.new       one that is being made, or a rest of that
snapshots/lock          held while one is made, or old ones are removed

KEY is a digest of all that such a guest depends on: the same key is the same machine. Nothing of a job is in a
snapshot: it was taken before the guest was told what it is for.
"""

from __future__ import annotations

import os
import stat

from ringfence.errors import HostError
from ringfence.runtime.spawn import agent_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Machine, Plan

# A new number makes new files: raise it when machines are saved in another way.
FORMAT = "2"
_MOST_RECORD_BYTES = 1 << 14
_PIECE_BYTES = 1 << 20
_KEY_BYTES = 20


def possible(plan: Plan) -> bool:
    """Say whether machines of `plan` can be saved and restored.

    A guest looks at its disks when it boots, so that a snapshot is good for the same disks only: mounts are copied anew
    at each start. Without root the VMM would be the owner of the file that other machines are restored from.
    """
    machine = plan["machine"]
    if machine is None or machine["vmm"] != "qemu" or plan["rootless"]:
        return False
    return [disk["kind"] for disk in machine["disks"]] == ["image"]


def snapshots_dir(state: str, *below: str) -> str:
    """Return the directory of snapshots in the state directory `state`, or what lies `below` in it."""
    return os.path.join(state, "snapshots", *below)


def key(plan: Plan, machine: Machine) -> str:
    """Return the name of the snapshot for machines of `plan`, which is `possible`. Raises HostError, OSError."""
    from _blake2 import blake2b

    parts = [
        FORMAT,
        machine["argv"],
        machine["version"],
        machine["kernel_digest"],
        # QEMU, its libraries and its firmware; the disk, of which the guest's kernel may have read.
        [_identity(op["source"]) for op in plan["stage"] if op["op"] == "bind"],
        [_identity(disk["source"]) for disk in machine["disks"]],
        _agent_digest(),
        # What a CPU offers may change with its microcode and the host's kernel: both come with a boot.
        boot_id() if machine["accelerator"] == "kvm" else "",
    ]
    return blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=_KEY_BYTES).hexdigest()


def _identity(path: str) -> tuple[str, int, int, int, int]:
    found = os.stat(path)
    return path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _agent_digest() -> str:
    descriptor = os.open(agent_path(), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return digest(descriptor)
    finally:
        os.close(descriptor)


def boot_id() -> str:
    """Return the kernel's name of this boot of the host."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read(64).strip()


def digest(descriptor: int) -> str:
    """Return the BLAKE2b digest of all of a file, whose offset is left alone. Raises OSError."""
    from _blake2 import blake2b

    found, at = blake2b(digest_size=32), 0
    while piece := os.pread(descriptor, _PIECE_BYTES, at):
        found.update(piece)
        at += len(piece)
    return found.hexdigest()


def file_facts(descriptor: int) -> dict[str, str]:
    """Return what changes when anybody changes a file: nobody can set a ctime."""
    found = os.fstat(descriptor)
    return {
        "file": f"{found.st_dev} {found.st_ino} {found.st_uid} {found.st_mode:o}",
        "size_bytes": str(found.st_size),
        "times": f"{found.st_mtime_ns} {found.st_ctime_ns}",
    }


def load(state: str, name: str, machine: Machine) -> int:
    """Return a read-only descriptor of the snapshot `name`, at its beginning; -1 when there is none.

    Whether it is as it was made is seen by its inode each time, and by its digest the first time after a boot. Raises
    HostError when it is not; then it is removed.
    """
    record = read_record(state, name)
    if record is None:
        return -1
    path = snapshots_dir(state, f"{name}.state")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:  # just being removed
        return -1
    except OSError as error:
        raise _unusable(state, name, f"cannot be opened: {error.strerror}") from error
    try:
        problem = _problem(state, name, record, descriptor, machine)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    if problem:
        os.close(descriptor)
        raise _unusable(state, name, problem)
    # Here, and not in the sandbox, where the limit on reading from disks would be in force.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    return descriptor


def _unusable(state: str, name: str, problem: str) -> HostError:
    drop(state, name)
    return HostError(
        f"the snapshot {snapshots_dir(state, name)}.state {problem}; it is removed now",
        hint="run again: it is made anew; --no-snapshot goes without",
    )


def _problem(state: str, name: str, record: dict[str, str], descriptor: int, machine: Machine) -> str:
    """Return why the snapshot must not be used, "" when it is good."""
    if record.get("format") != FORMAT or record.get("vmm") != machine["version"]:
        return f"is of another version: {record.get('vmm', 'unknown')!r}, not {machine['version']!r}"
    facts = file_facts(descriptor)
    if record.get("size_bytes") != facts["size_bytes"]:
        return f"has {facts['size_bytes']} bytes instead of {record.get('size_bytes', 'as many as it had')}"
    if any(record.get(fact) != value for fact, value in facts.items()):
        return "was changed after it was made"
    boot = boot_id()
    if record.get("boot") != boot and digest(descriptor) != record.get("blake2b"):
        return "has another digest than it had"
    _note_use(state, name, record, boot)
    return ""


def _note_use(state: str, name: str, record: dict[str, str], boot: str) -> None:
    """Write down that it was looked at in this boot, and used now: the ones not used for the longest time go first."""
    try:
        if record.get("boot") != boot:
            write_record(state, name, {**record, "boot": boot})
        else:
            os.utime(snapshots_dir(state, f"{name}.record"))
    except OSError:
        return  # the disk is full or read-only, or the snapshot was just removed: this run has it all the same


def read_record(state: str, name: str) -> dict[str, str] | None:
    """Return what the record of the snapshot `name` says, None when there is none; what is no record is empty."""
    try:
        descriptor = os.open(
            snapshots_dir(state, f"{name}.record"), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        text = os.read(descriptor, _MOST_RECORD_BYTES).decode("utf-8", "replace") if own else ""
    except OSError:
        text = ""
    finally:
        os.close(descriptor)
    lines = (line.partition(" ") for line in text.splitlines())
    return {fact: value for fact, _, value in lines}


def write_record(state: str, name: str, record: dict[str, str]) -> None:
    """Write a record in the place of one that may be there. Raises OSError."""
    text = "".join(f"{fact} {' '.join(value.split())}\n" for fact, value in record.items())
    temporary = snapshots_dir(state, f".{name}.{os.urandom(8).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            os.write(descriptor, text.encode("utf-8", "surrogateescape"))
        finally:
            os.close(descriptor)
        os.rename(temporary, snapshots_dir(state, f"{name}.record"))
    except BaseException:
        os.unlink(temporary)
        raise


def drop(state: str, name: str) -> None:
    """Remove the snapshot `name`; machines that are being restored from it have it open. Never fails."""
    # The record first: a file without one is nobody's.
    for end in ("record", "state"):
        try:
            os.unlink(snapshots_dir(state, f"{name}.{end}"))
        except OSError:
            continue
