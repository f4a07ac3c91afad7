"""`Image`: the files that a sandbox sees as its root. On the way of every `run`, so it imports nothing."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Image:
    """One image, found and checked.

    name    what the user called it: "base", "host", or the directory given with --rootfs
    digest  its identity in proofs and in the key of the plan cache: "sha256:..." over the content of a built
            image; "host:..." or "rootfs:..." over what is cheap to know of files that Ringfence did not build
    kind    "host" (assembled from ringfence.image.host.host_view) or "rootfs" (a directory)
    rootfs  absolute path of the root directory without symlinks on its way; "" for host
    env     the environment a job starts from, each "NAME=value"
    cwd     where a job starts
    """

    __slots__ = ("cwd", "digest", "env", "kind", "name", "rootfs")

    def __init__(self, name: str, digest: str, kind: str, rootfs: str) -> None:
        """Make an image with the default environment; the caller vouches for the rest."""
        self.name = name
        self.digest = digest
        self.kind = kind
        self.rootfs = rootfs
        self.env: tuple[str, ...] = (f"PATH={PATH}", "LANG=C.UTF-8")
        self.cwd = "/"

    def __repr__(self) -> str:
        return f"Image({self.name!r}, {self.digest!r}, {self.kind!r}, {self.rootfs!r})"
