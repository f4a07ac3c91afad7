"""Paths in a policy: mount sources and targets, and device nodes; text only, no file is looked at."""

from __future__ import annotations

import posixpath
import re

from ringfence.errors import PolicyError
from ringfence.policy.units import show

# Whoever reaches one of these sockets can start containers or services on the host, as root.
_SOCKETS = """
docker.sock dockerd.sock containerd.sock containerd.sock.ttrpc crio.sock podman.sock buildkitd.sock
cri-dockerd.sock dockershim.sock libvirt-sock system_bus_socket
"""
RUNTIME_SOCKETS = frozenset(_SOCKETS.split())
_KERNEL = {"/proc": "the kernel's process files", "/sys": "the kernel's device files", "/dev": "device nodes"}
# Directories that hold runtime sockets or the file systems of other containers.
_HOLDERS = {
    "/run": "runtime sockets",
    "/var/run": "runtime sockets",
    "/run/systemd": "systemd's sockets",
    "/var/lib/docker": "other containers' files",
    "/var/lib/containerd": "other containers' files",
    "/var/lib/containers": "other containers' files",
    "/var/lib/kubelet": "other containers' files and secrets",
}


def dangerous(source: str) -> str:
    """Return why mounting the absolute, resolved host path `source` gives the host away, or "".

    The caller resolves symbolic links first, and asks again for whatever it resolved to.
    """
    if source == "/":
        return "the whole host file system"
    for path, what in _KERNEL.items():
        if source == path or source.startswith(f"{path}/"):
            return what
    if posixpath.basename(source) in RUNTIME_SOCKETS:
        return "a runtime socket"
    for path, what in _HOLDERS.items():
        if path == source or path.startswith(f"{source}/"):
            return what
    if re.match(r"(/var)?/run/(docker|containerd|crio|podman|dbus|systemd|user(/[0-9]+)?)(/|$)", source):
        return "runtime sockets"
    return ""


def host_path(value: object, directory: str) -> str:
    """Return an absolute normal path; a relative one starts at `directory`."""
    if not isinstance(value, str) or not value:
        raise PolicyError(f"{show(value)} is not a path", hint="write for example ./data or /srv/data")
    return _normal(posixpath.join(directory, value))


def target(value: object) -> str:
    """Return the absolute normal path inside the sandbox that a mount may cover."""
    path = _absolute(value, "/data")
    if path == "/":
        raise PolicyError("a mount cannot cover /", hint="choose an image or --rootfs for the root")
    if path == "/tmp":
        raise PolicyError("a mount cannot cover /tmp", hint="filesystem.tmp makes it; choose a path below it")
    for kernel in _KERNEL:
        if path == kernel or path.startswith(f"{kernel}/"):
            raise PolicyError(
                f"a mount cannot cover {path}", hint=f"{kernel} is Ringfence's own; choose another"
            )
    return path


def device(value: object) -> str:
    """Return ``/dev/NAME:ACCESS`` with access r, rw (when none is written) or rwm."""
    path, _, access = value.partition(":") if isinstance(value, str) else ("", "", "")
    if (
        not re.fullmatch("/dev/[^:]+", path)
        or (access or "rw") not in ("r", "rw", "rwm")
        or value == f"{path}:"
    ):
        raise PolicyError(f"{show(value)} is not a device", hint="write for example /dev/fuse or /dev/kvm:rw")
    path = _absolute(path, "/dev/fuse")
    if path == "/dev":
        raise PolicyError(f"{show(value)} is not a device", hint="name each device, for example /dev/fuse")
    return f"{path}:{access or 'rw'}"


def _absolute(value: object, example: str) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise PolicyError(f"{show(value)} is not an absolute path", hint=f"write for example {example}")
    if ".." in value.split("/"):
        raise PolicyError(f"{show(value)} contains '..'", hint="write the path it means")
    return _normal(value)


def _normal(path: str) -> str:
    # normpath keeps two leading slashes, which POSIX leaves to the implementation and Linux ignores.
    return "/" + posixpath.normpath(path).lstrip("/")
