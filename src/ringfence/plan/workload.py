"""What is to be run: the image and what of the host was looked up for it, as plain facts for a pure plan."""

import msgspec

from ringfence.host.sources import Source


class HostFiles(msgspec.Struct, frozen=True):
    """How the image ``host`` is assembled: directories to bind, (path, target) symlinks, files to copy."""

    binds: tuple[str, ...]
    symlinks: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was found and mounts that were resolved; `rootfs` is "" for the image ``host``.

    `env` is the environment that the image starts a job with; `moby` the bytes of the seccomp profile that
    the policy names by path, read by the caller.
    """

    image: str
    image_digest: str
    rootfs: str
    env: tuple[str, ...]
    host_files: HostFiles | None = None
    sources: tuple[Source, ...] = ()
    moby: bytes | None = None
