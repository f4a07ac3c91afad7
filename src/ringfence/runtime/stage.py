"""Carry out the staging operations of a plan, in a mount namespace that the caller has made private.

Works relative to the thread's current directory, so that the overlay's options, which a sandbox can read in its
mountinfo, name no host path.
"""

from __future__ import annotations

import errno
import os
import stat

from ringfence.errors import HostError, MountError
from ringfence.linux import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Bind, Op, Overlay, Owner

_MOST_BYTES = 1 << 20
_MOST_MODULE_BYTES = 16 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_RULES = libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_NO_MAGICLINKS
_KINDS = {
    "directory": stat.S_IFDIR,
    "file": stat.S_IFREG,
    "socket": stat.S_IFSOCK,
    "fifo": stat.S_IFIFO,
}


class Ids:
    """Who owns what is staged: the ids of the sandbox's root and job, and user namespaces for idmapped mounts.

    `userns` is a descriptor of the sandbox's user namespace, -1 where mounts cannot be idmapped (rootless). Files
    that are `served` (by gVisor's gofer) are made by the sandbox's root, who gives them to the job at once.
    """

    __slots__ = ("base", "gid", "served", "uid", "userns")

    def __init__(self, *, base: int, uid: int, gid: int, userns: int, served: bool = False) -> None:
        """`base` is the host id of the sandbox's root, `uid` and `gid` those of the job inside."""
        self.served = served
        self.base = base
        self.uid = uid
        self.gid = gid
        self.userns = userns

    def of(self, owner: Owner) -> tuple[int, int]:
        """Return (uid, gid) as this mount namespace writes them."""
        return (self.base + self.uid, self.base + self.gid) if owner == "job" else (self.base, self.base)


class Stager:
    """One staging directory being filled."""

    def __init__(self, staging: str, ids: Ids, agent: str) -> None:
        """Stage at directory `staging`; `agent` is the path of the agent's binary."""
        self.staging = staging
        self.ids = ids
        self.agent = agent
        self._layers: list[str] = []

    def run(self, ops: list[Op]) -> None:
        """Carry out `ops` in order. Raises MountError, HostError, OSError; the namespace's end undoes it all."""
        os.chdir(self.staging)
        for op in ops:
            try:
                self._one(op)
            except OSError as error:
                raise _explain(op, error) from error

    def _one(self, op: Op) -> None:
        if op["op"] == "directory":
            self._directory(op["at"], op["mode"], op["owner"])
        elif op["op"] == "node":
            self._node(op["at"], op["number"], op["owner"])
        elif op["op"] == "initrd":
            self._initrd(op["at"], op["modules"])
        elif op["op"] == "file":
            self._file(op["at"], op["text"].encode(), op["mode"])
        elif op["op"] == "host-file":
            self._file(op["at"], _public(op["source"]), 0o644)
        elif op["op"] == "symlink":
            os.symlink(op["target"], op["at"])
        elif op["op"] == "agent":
            self._file(op["at"], _read(self.agent, 8 << 20), 0o555)
        elif op["op"] == "tmpfs":
            self._tmpfs(op["at"], op["size_bytes"], op["inodes"], op["mode"], op["owner"])
        elif op["op"] == "overlay":
            self._overlay(op)
        elif op["op"] == "bind":
            self._bind(op)
        elif op["op"] == "share":
            self._share(op["source"], op["at"])
        else:
            libc.detach(op["path"])

    def _directory(self, at: str, mode: int, owner: Owner) -> None:
        home, _, name = at.rpartition("/")
        parent = self._opened(home)
        try:
            self._make(parent, name, mode, owner)
        finally:
            os.close(parent)

    def _opened(self, at: str) -> int:
        """Return the directory `at`, made with those above it if need be, and reached through no symlink."""
        here = os.open(".", _DIRECTORY)
        try:
            for part in filter(None, at.split("/")):
                self._make(here, part, 0o755, "root")
                here, above = libc.openat2(here, part, _DIRECTORY, _RULES), here
                os.close(above)
        except BaseException:
            os.close(here)
            raise
        return here

    def _make(self, parent: int, name: str, mode: int, owner: Owner) -> None:
        try:
            os.mkdir(name, mode, dir_fd=parent)
        except FileExistsError:
            return
        made = libc.openat2(parent, name, _DIRECTORY, _RULES)
        try:
            os.fchmod(made, mode)
            os.fchown(made, *self.ids.of(owner))
        finally:
            os.close(made)

    def _node(self, at: str, number: str, owner: Owner) -> None:
        """Make a device node in a directory of its own, the one mount here on which a node can be opened."""
        home, _, _ = at.rpartition("/")
        self._directory(home, 0o755, "root")
        libc.mount("tmpfs", home, "tmpfs", libc.MS_NOSUID, "size=4096,nr_inodes=4,mode=755")
        major, _, minor = number.partition(":")
        os.mknod(at, stat.S_IFCHR | 0o600, os.makedev(int(major), int(minor)))
        os.chown(at, *self.ids.of(owner), follow_symlinks=False)
        os.chmod(at, 0o600)

    def _initrd(self, at: str, modules: list[str]) -> None:
        from ringfence.runtime.initrd import initrd

        parts = [(os.path.basename(path), _read(path, _MOST_MODULE_BYTES)) for path in modules]
        self._file(at, initrd(_read(self.agent, _MOST_BYTES), parts), 0o444)

    def _file(self, at: str, data: bytes, mode: int) -> None:
        home, _, name = at.rpartition("/")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        parent = self._opened(home)
        try:
            fd = os.open(name, flags, mode, dir_fd=parent)
        finally:
            os.close(parent)
        try:
            while data:
                data = data[os.write(fd, data) :]
            os.fchmod(fd, mode)
            os.fchown(fd, *self.ids.of("root"))
        finally:
            os.close(fd)

    def _tmpfs(self, at: str, size_bytes: int, inodes: int, mode: int, owner: Owner) -> None:
        uid, gid = self.ids.of(owner)
        data = f"size={size_bytes},nr_inodes={inodes},mode={mode:o},uid={uid},gid={gid}"
        libc.mount("tmpfs", at, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, data)
        if at == ".":  # the current directory is still the one below the new mount
            os.chdir(self.staging)

    def _overlay(self, op: Overlay) -> None:
        self._layers = op["lower"][1:]
        flags = libc.MS_NOSUID | libc.MS_NODEV
        data = "lowerdir=" + ":".join(op["lower"]) + ",redirect_dir=nofollow,metacopy=off"
        data += ",userxattr" if op["user"] else ""
        if op["upper"]:
            data += f",upperdir={op['upper']}/files,workdir={op['upper']}/work"
        else:
            flags |= libc.MS_RDONLY
        libc.mount("overlay", op["at"], "overlay", flags, data)

    def _bind(self, op: Bind) -> None:
        source = open_plain(op["source"])
        try:
            found = os.fstat(source)
            if stat.S_IFMT(found.st_mode) != _KINDS.get(op["kind"]):
                raise MountError(
                    f"mount source {op['source']!r} is no longer a {op['kind']}", hint="run again"
                )
            tree = libc.clone_tree(source, "")
            try:
                self._attributes(tree, op, found)
                self._attach(tree, op)
            finally:
                os.close(tree)
        finally:
            os.close(source)

    def _attributes(self, tree: int, op: Bind, found: os.stat_result) -> None:
        attributes = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV
        if op["read_only"]:
            attributes |= libc.MOUNT_ATTR_RDONLY
        if op["ids"] == "none":
            libc.set_mount_attributes(tree, attributes)
            return
        if op["ids"] == "image":
            libc.set_mount_attributes(tree, attributes | libc.MOUNT_ATTR_IDMAP, self.ids.userns)
            return
        userns = self._owner_userns(found.st_uid, found.st_gid)
        try:
            libc.set_mount_attributes(tree, attributes | libc.MOUNT_ATTR_IDMAP, userns)
        finally:
            os.close(userns)

    def _owner_userns(self, uid: int, gid: int) -> int:
        """A map in which the owner of a source is the job, and nobody else is anybody."""
        from ringfence.linux.userns import make_userns

        job, root = self.ids.of("job"), self.ids.base
        uids, gids = [(uid, job[0], 1)], [(gid, job[1], 1)]
        if self.ids.served:
            # For a moment such a file belongs to the sandbox's own root, an id that nobody on the host has.
            uids += [(root, root, 1)] if job[0] != root else []
            gids += [(root, root, 1)] if job[1] != root else []
        return make_userns(self.agent, uids, gids)

    def _attach(self, tree: int, op: Bind) -> None:
        if op["below"] == "root":
            self._not_through_link(op["at"])
        # Below the root lie files of an image or of an earlier mount: no symlink in them may lead elsewhere.
        target = _open_target("root" if op["below"] == "root" else ".", op["at"])
        try:
            libc.attach_tree(tree, target)
        finally:
            os.close(target)

    def _not_through_link(self, at: str) -> None:
        """Refuse /bin/x where the image has a symlink /bin: a directory of ours would hide all that it leads to."""
        for layer in self._layers:
            try:
                os.close(_open_target(layer, at, os.O_NOFOLLOW))
            except (FileNotFoundError, NotADirectoryError):
                pass

    def _share(self, source: str, at: str) -> None:
        directory = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            tree = libc.clone_tree(directory, "")
        finally:
            os.close(directory)
        try:
            target = _open_target("root", at)
            try:
                libc.attach_tree(tree, target)
            finally:
                os.close(target)
        finally:
            os.close(tree)


def _open_target(below: str, at: str, flags: int = 0) -> int:
    root = os.open(below, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        resolve = libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_NO_MAGICLINKS
        return libc.openat2(root, at, os.O_PATH | flags, resolve)
    finally:
        os.close(root)


def open_plain(path: str) -> int:
    """Open a path that was resolved when the plan was made; a symlink on it now is somebody's trick."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return libc.openat2(
            root, path.lstrip("/") or ".", os.O_PATH, libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_NO_MAGICLINKS
        )
    finally:
        os.close(root)


def _read(path: str, most_bytes: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if os.fstat(fd).st_size > most_bytes:
            raise MountError(f"{path} is larger than {most_bytes} bytes")
        data = b""
        while piece := os.read(fd, most_bytes):
            data += piece
        return data
    finally:
        os.close(fd)


def _public(path: str) -> bytes:
    """Read a small file of the host's that everybody may read; nothing else may get into a sandbox this way."""
    fd = open_plain(path)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) or not mode & stat.S_IROTH:
            raise MountError(f"{path} is not a file that everybody may read")
        return _read(f"/proc/self/fd/{fd}", _MOST_BYTES)
    finally:
        os.close(fd)


_AT_MOUNT = {
    errno.ELOOP: "the target goes through a symlink; write the path that it leads to",
    errno.ENOENT: "there is no such path to mount on; make it in the mount around it first",
    errno.EINVAL: "a directory cannot cover a file, nor a file a directory",
    errno.ENOTDIR: "a directory cannot cover a file, nor a file a directory",
    errno.EEXIST: "a directory cannot cover a file, nor a file a directory",
}


def _explain(op: Op, error: OSError) -> HostError | MountError:
    reason = error.strerror or str(error)
    if op["op"] == "bind":
        if error.errno == errno.EINVAL and error.filename == "mount_setattr":
            return MountError(
                f"cannot map the owners of {op['source']!r}: its file system has no idmapped mounts",
                hint="keep it on ext4, xfs, btrfs, or a tmpfs of Linux 6.3",
            )
        hint = _AT_MOUNT.get(error.errno or 0, "see --debug")
        if error.filename == op["source"].lstrip("/"):
            hint = "the source has changed since the plan was made; run again"
        return MountError(f"cannot mount {op['source']!r} at {op['at']!r}: {reason}", hint=hint)
    if op["op"] in ("file", "directory") and error.errno in _AT_MOUNT:
        # Ours are made first and in an empty directory: only the mount points of a policy can be in their own way.
        target = "/" + op["at"].partition("/")[2]
        return MountError(f"cannot make {target!r} to mount on: {reason}", hint=_AT_MOUNT[error.errno])
    return HostError(f"cannot stage {op['op']} {error.filename or ''}: {reason}", hint="see --debug")
