"""What is to be run: the image and what of the host was looked up for it, as plain facts for a pure plan."""

import msgspec

from ringfence.host.sources import Source


class HostFiles(msgspec.Struct, frozen=True):
    """How the image ``host`` is assembled: directories to bind, (path, target) symlinks, files to copy."""

    binds: tuple[str, ...]
    symlinks: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]


class Start(msgspec.Struct, frozen=True):
    """How an image wants to be started; taken as a wish, under the policy.

    `user` is (uid, gid) inside, None for root or nobody in particular; `volumes` are directories that the image
    expects to be writable; `stop_signal` is a signal's number.
    """

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    cwd: str = ""
    user: tuple[int, int] | None = None
    volumes: tuple[str, ...] = ()
    stop_signal: int = 15


class GuestKernel(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel that a microVM boots: an uncompressed ELF file, modules that it loads, how it is started."""

    name: str
    path: str
    digest: str
    release: str
    acpi: bool
    cmdline: str
    modules: tuple[str, ...] = ()


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was found and mounts that were resolved.

    `layers` are the root directories of its layers, lowest first; none for the image ``host``.

    `disks` are the block devices ("254:0") that the image and the mounts lie on, `unknown_disks` those of the
    paths that lie on something whose disk is not known (a network file system).
    `kernel` and `disk`, the image as a disk, are there for a microVM alone. `noticed` are paths in the image, without
    the leading slash, that a tier has a warning about.
    `env` is the environment that the image starts a job with; `moby` the bytes of the seccomp profile that
    the policy names by path, read by the caller.
    """

    image: str
    image_digest: str
    image_record: str = ""
    layers: tuple[str, ...]
    env: tuple[str, ...]
    start: Start = Start()
    host_files: HostFiles | None = None
    sources: tuple[Source, ...] = ()
    disks: tuple[str, ...] = ()
    unknown_disks: tuple[str, ...] = ()
    moby: bytes | None = None
    noticed: frozenset[str] = frozenset()
    kernel: GuestKernel | None = None
    disk: str = ""
