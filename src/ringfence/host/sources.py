"""What a policy's bind mounts really point at, and whether showing it to a sandbox would give the host away.

A source is resolved once, here. The start of a sandbox opens the resolved path again without following any
symlink, so that one swapped in between is refused there.
"""

import os
import stat
from typing import Literal

import msgspec

from ringfence.errors import MountError
from ringfence.linux.paths import ROOT_RUN, ROOT_STATE
from ringfence.policy.model import Mount, Policy
from ringfence.policy.paths import RUNTIME_SOCKETS, dangerous

Kind = Literal["directory", "file", "socket", "fifo", "device"]

# The owner of a source is the job's user inside: of these as a whole it would get every secret to read.
_SECRET = ("/boot", "/etc", "/home", "/root", "/var", "/var/lib")
# Writing to one of these as a whole is writing to the host.
_SYSTEM = ("/bin", "/lib", "/lib64", "/opt", "/sbin", "/usr")
_OTHER_END = {
    "socket": "a socket: whoever answers it is outside the sandbox",
    "fifo": "a FIFO: whoever is at its other end is outside the sandbox",
}


class Source(msgspec.Struct, frozen=True):
    """A mount of the policy with its `source` resolved: absolute, no symlinks; `given` is what the user wrote.

    `rule` is what the devices cgroup calls a device, with the access that the policy gives: "c 10:229 rw".
    """

    given: str
    source: str
    target: str
    kind: Kind
    read_only: bool
    rule: str = ""


def resolve_sources(policy: Policy, *, own: tuple[str, ...]) -> tuple[Source, ...]:
    """Resolve and judge every mount and device of `policy`; `own` are Ringfence's state and run directories.

    Raises MountError for a source that is missing, a device, dangerous or reached through a symlink that leads
    out of its directory without ``allow_dangerous``, or that shows `own`.
    """
    mounts = tuple(_resolve(mount, own) for mount in policy.filesystem.mounts)
    return mounts + tuple(_device(text) for text in policy.devices)


def _resolve(mount: Mount, own: tuple[str, ...]) -> Source:
    try:
        source, way_out = _follow(mount.source)
        found = os.lstat(source)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MountError(
            f"mount source {mount.source!r}: {reason}", hint="create it first, or correct the path"
        ) from error
    for directory in (*own, ROOT_STATE, ROOT_RUN):
        if _inside(directory, source) or _inside(source, directory):
            raise MountError(
                f"mount source {mount.source!r} shows Ringfence's own {directory}",
                hint="mount a directory that holds only what the job needs",
            )
    if way_out and not mount.allow_dangerous:
        raise MountError(
            f"mount source {mount.source!r}: the symbolic link {way_out} leads out of its directory, to {source}",
            hint=f"if that is what you mean, write {source} itself",
        )
    kind = _kind(found.st_mode)
    if kind == "device":
        raise MountError(
            f"mount source {mount.source!r} is a device node, and mounts are nodev",
            hint="list it under devices (--device)",
        )
    danger = _danger(source, kind, writes=mount.mode == "rw")
    if danger and not mount.allow_dangerous:
        via = f" (really {source})" if source != mount.source else ""
        raise MountError(
            f"mount source {mount.source!r}{via} is or holds {danger}",
            hint="choose a narrower one; if it must be, write allow_dangerous: true at the mount",
        )
    return Source(mount.source, source, mount.target, kind, mount.mode == "ro")


def _follow(path: str) -> tuple[str, str]:
    """Return `path` without symlinks, and the first of them that leads out of the directory it lies in, or "".

    Whoever may write to a directory, such as an earlier job, could otherwise have anything of the host shown to
    the next one. Raises OSError for a path that leads nowhere, ValueError for one with a NUL.
    """
    here, way_out = "/", ""
    for part in path.split("/"):
        link = os.path.join(here, part)
        real = os.path.realpath(link, strict=True)
        if not _inside(real, here):
            way_out = way_out or link
        here = real
    return here, way_out


def _device(text: str) -> Source:
    path, _, access = text.partition(":")
    try:
        source = os.path.realpath(path, strict=True)
        found = os.lstat(source)
    except OSError as error:
        raise MountError(f"device {path!r}: {error.strerror}", hint="'ls -l /dev' lists them") from error
    if _kind(found.st_mode) != "device" or not _inside(source, "/dev"):
        raise MountError(f"{path!r} is not a device node in /dev", hint="name one, such as /dev/fuse")
    letter = "b" if stat.S_ISBLK(found.st_mode) else "c"
    number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    return Source(path, source, path, "device", False, f"{letter} {number} {access or 'rw'}")


def _kind(mode: int) -> Kind:
    kinds: dict[int, Kind] = {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "fifo" if stat.S_ISFIFO(mode) else "device")


def _danger(source: str, kind: Kind, *, writes: bool) -> str:
    """Say why `source` must not be shown without the user's own words, "" when it may."""
    why = dangerous(source) or _OTHER_END.get(kind, "")
    if why:
        return why
    for name in sorted(RUNTIME_SOCKETS) if kind == "directory" else ():
        if os.path.lexists(f"{source}/{name}"):
            return f"the runtime socket {name}"
    if source in _SECRET:
        return f"secrets of the host: a job could read {source} as its owner"
    return f"the host's own {source}, writable" if writes and source in _SYSTEM else ""


def _inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
