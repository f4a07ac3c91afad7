"""The image `host`: a read-only view of the host's programs, without what is the host's own business.

Seen are /usr and what the dynamic linker, TLS, time zones and service names read from /etc. Not seen are
/home, /root, /var, /run, /srv, /opt, and every other file of /etc: it is a list of what is shown, so that new
files stay hidden.
/usr/local is part of /usr and is shown: whoever keeps secrets there must not make them world-readable.
"""

import os
import stat

# Not bound one by one as the host has them: those of a merged /usr are symlinks, the others directories.
_TOP = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Directories of certificates and of symlinks into /usr; /etc/ssl/private is not in the first one.
_BINDS = ("usr", "etc/alternatives", "etc/ssl/certs")
_FILES = (
    "etc/ld.so.cache",
    "etc/ld-musl-aarch64.path",
    "etc/ld-musl-x86_64.path",
    "etc/localtime",
    "etc/mime.types",
    "etc/protocols",
    "etc/services",
    "etc/ssl/openssl.cnf",
)
_CHANGES = ("usr", "usr/bin", "usr/lib", "usr/local", "var/lib/dpkg/status")
_MAX_BYTES = 1 << 20


class HostView:
    """What to assemble; all paths are absolute, in the host and in the sandbox alike.

    binds     directories to bind, read-only
    symlinks  (path, target) to make anew
    files     (path, content) to copy, mode 0644
    """

    __slots__ = ("binds", "files", "symlinks")

    def __init__(
        self,
        binds: tuple[str, ...],
        symlinks: tuple[tuple[str, str], ...],
        files: tuple[tuple[str, bytes], ...],
    ) -> None:
        """Hold the three lists."""
        self.binds = binds
        self.symlinks = symlinks
        self.files = files


def host_view(root: str = "/") -> HostView:
    """List what a sandbox may see of the host below `root`, without what is missing or not public."""
    from ringfence.image.skeleton import account_files, name_files

    symlinks: list[tuple[str, str]] = []
    binds = [f"/{path}" for path in _BINDS if _is_public_directory(os.path.join(root, path))]
    for name in _TOP:
        path = os.path.join(root, name)
        if os.path.islink(path):
            symlinks.append((f"/{name}", os.readlink(path)))
        elif _is_public_directory(path):
            binds.append(f"/{name}")
    copied = ((f"/{path}", _public_content(root, path)) for path in _FILES)
    files = [(path, content) for path, content in copied if content is not None]
    files += [(f"/{path}", content) for path, content in (account_files() | name_files()).items()]
    return HostView(tuple(binds), tuple(symlinks), tuple(files))


def host_digest(root: str = "/") -> str:
    """Return "host:" and 32 digits that change when packages or the copied files below `root` do.

    It reads no content: a change inside /usr that bypasses the package manager keeps the digest.
    """
    from _blake2 import blake2b  # the same as in hashlib, which would load all of OpenSSL: 5 ms of every run

    facts = blake2b(digest_size=16)
    for path in (*_TOP, *_BINDS, *_FILES, *_CHANGES):
        try:
            found = os.stat(os.path.join(root, path))
        except OSError:
            facts.update(b"-")
        else:
            facts.update(
                f"{found.st_dev},{found.st_ino},{found.st_mode},{found.st_size},{found.st_mtime_ns};".encode()
            )
    return f"host:{facts.hexdigest()}"


def _is_public_directory(path: str) -> bool:
    """Say whether `path` is a directory, no symlink, that all may read and only its owner may change."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return stat.S_ISDIR(mode) and mode & 0o005 == 0o005 and not mode & 0o022


def _public_content(root: str, path: str) -> bytes | None:
    """Return the bytes of a small world-readable file whose real place is in /etc or /usr, else None."""
    real = os.path.realpath(os.path.join(root, path))
    homes = tuple(os.path.join(os.path.realpath(root), home, "") for home in ("etc", "usr"))
    if not real.startswith(homes):
        return None
    try:
        # O_NONBLOCK: a FIFO there must not make us wait.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        public = stat.S_ISREG(found.st_mode) and found.st_mode & stat.S_IROTH
        return os.read(descriptor, _MAX_BYTES) if public and found.st_size <= _MAX_BYTES else None
    finally:
        os.close(descriptor)
