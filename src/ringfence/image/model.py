"""`Image`: the files that a sandbox sees as its root. On the way of every `run`, so it imports nothing."""

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENV = (f"PATH={PATH}", "LANG=C.UTF-8")  # what a job starts with, before the image's own


class Image:
    """One image, found.

    name    what it is called: the canonical name ("base:latest"), "host", or the directory given with --rootfs
    digest  its identity in proofs and in the key of the plan cache: that of its manifest for an image of the store;
            "host:..." or "rootfs:..." over what is cheap to know of files that Ringfence did not build
    kind    "store", "host" (assembled from ringfence.image.host.host_view) or "rootfs" (a directory)
    path    of a directory: where it really is; of an image of the store: its record, which is held while it runs
    state   the state directory whose store has it, "" for the other kinds
    """

    __slots__ = ("digest", "kind", "name", "path", "state")

    def __init__(self, name: str, digest: str, kind: str, path: str = "", state: str = "") -> None:
        """Hold the facts; the caller vouches for them."""
        self.name = name
        self.digest = digest
        self.kind = kind
        self.path = path
        self.state = state

    def __repr__(self) -> str:
        return f"Image({self.name!r}, {self.digest!r}, {self.kind!r}, {self.path!r})"
