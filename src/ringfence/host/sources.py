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

Kind = Literal["directory", "file", "device"]

# Whoever can speak to one of these can start processes outside the sandbox.
_SOCKETS = (
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/podman/podman.sock",
    "/run/dbus/system_bus_socket",
    "/run/systemd/private",
    "/run/buildkit/buildkitd.sock",
)
_KERNEL = ("/proc", "/sys", "/dev")
# Writing to one of these as a whole is writing to the host.
_SYSTEM = ("/bin", "/boot", "/etc", "/home", "/lib", "/lib64", "/opt", "/root", "/sbin", "/usr", "/var")


class Source(msgspec.Struct, frozen=True):
    """A mount of the policy with its `source` resolved: absolute, no symlinks; `given` is what the user wrote."""

    given: str
    source: str
    target: str
    kind: Kind
    read_only: bool


def resolve_sources(policy: Policy, *, own: tuple[str, ...]) -> tuple[Source, ...]:
    """Resolve and judge every mount and device of `policy`; `own` are Ringfence's state and run directories.

    Raises MountError for a source that is missing, dangerous without ``allow_dangerous``, or holds `own`.
    """
    mounts = tuple(_resolve(mount, own) for mount in policy.filesystem.mounts)
    return mounts + tuple(_device(text) for text in policy.devices)


def _resolve(mount: Mount, own: tuple[str, ...]) -> Source:
    try:
        source = os.path.realpath(mount.source, strict=True)
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
    danger = _danger(source, found.st_mode, writes=mount.mode == "rw")
    if danger and not mount.allow_dangerous:
        via = f" (really {source})" if source != mount.source else ""
        raise MountError(
            f"mount source {mount.source!r}{via} {danger}",
            hint="choose a narrower one; if it must be, write allow_dangerous: true at the mount",
        )
    return Source(mount.source, source, mount.target, _kind(found.st_mode), mount.mode == "ro")


def _device(text: str) -> Source:
    path, _, _ = text.partition(":")
    try:
        source = os.path.realpath(path, strict=True)
        mode = os.lstat(source).st_mode
    except OSError as error:
        raise MountError(f"device {path!r}: {error.strerror}", hint="'ls -l /dev' lists them") from error
    if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)) or not _inside(source, "/dev"):
        raise MountError(f"{path!r} is not a device node in /dev", hint="name one, such as /dev/fuse")
    return Source(path, source, path, "device", False)


def _kind(mode: int) -> Kind:
    if stat.S_ISDIR(mode):
        return "directory"
    return "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "file"


def _danger(source: str, mode: int, *, writes: bool) -> str:
    """Say why `source` must not be shown without the user's own words, "" when it may."""
    if source == "/":
        return "is the whole host"
    for kernel in _KERNEL:
        if _inside(source, kernel):
            return f"belongs to the kernel's {kernel}"
    if stat.S_ISSOCK(mode):
        return "is a socket: whoever answers it is outside the sandbox"
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        return "is a device"
    if stat.S_ISFIFO(mode):
        return "is a FIFO: whoever reads it is outside the sandbox"
    for path in _SOCKETS:
        if _inside(os.path.realpath(path), source):
            return f"holds the runtime socket {path}"
    if writes and source in _SYSTEM:
        return f"is the host's own {source}, writable"
    return ""


def _inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
