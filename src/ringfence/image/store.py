"""The images below the state directory: where everything lies, who may change it, what is there.

images/blobs/sha256/HEX            manifests, configurations, layers as transported: named by their digest
images/layers/sha256-HEX/fs/       one unpacked layer, HEX its diff_id
images/images/sha256-HEX.json      the record of the manifest HEX; a sandbox of it holds a read lock on this file
images/refs/NAME                   a symlink to a record, NAME percent-encoded
images/disks/                      read-only disk images
images/verified/                   which images were fetched under which policy for signatures: see rules.py
images/locks/                      one for each name that is being pulled, and `working`, see there
images/lock                        held for a moment by whoever publishes or removes

What is written is written elsewhere and then renamed, so a kill at any moment leaves a store that works.
"""

import fcntl
import os
import re
import time
from contextlib import contextmanager

import msgspec

from ringfence.errors import ImageError
from ringfence.image.record import ImageRecord

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_RECORD_BYTES = 8 << 20
# Names and records of root's images can be read, and its layers reached, by users who run them; blobs need not be.
DIRECTORIES = {
    "": 0o711,
    "blobs": 0o700,
    "blobs/sha256": 0o700,
    "layers": 0o711,
    "images": 0o755,
    "refs": 0o755,
    "disks": 0o711,
    "locks": 0o700,
    "verified": 0o755,
}


def images_dir(state: str, *below: str) -> str:
    """Return the path of the store in the state directory `state`, or of what lies `below` in it."""
    return os.path.join(state, "images", *below)


def blob_path(state: str, digest: str) -> str:
    """Return where the blob `digest` lies. Raises ImageError for what is no sha256 digest."""
    return images_dir(state, "blobs", "sha256", _hex(digest))


def layer_path(state: str, diff_id: str) -> str:
    """Return the directory of the unpacked layer `diff_id`; its files are in ``fs`` there."""
    return images_dir(state, "layers", f"sha256-{_hex(diff_id)}")


def record_path(state: str, digest: str) -> str:
    """Return where the record of the manifest `digest` lies; sandboxes of the image hold a read lock on it."""
    return images_dir(state, "images", f"sha256-{_hex(digest)}.json")


def is_digest(text: str) -> bool:
    """Say whether `text` is a digest that the store can name."""
    return _DIGEST.fullmatch(text) is not None


def _hex(digest: str) -> str:
    if not is_digest(digest):
        raise ImageError(f"{digest!r} is no digest of the form sha256:64 hexadecimal digits")
    return digest.removeprefix("sha256:")


def make_store(state: str) -> None:
    """Make the directories of the store that are missing. Raises ImageError."""
    try:
        for name, mode in DIRECTORIES.items():
            path = images_dir(state, name).rstrip("/")
            try:
                os.mkdir(path, mode)
                os.chmod(path, mode)  # whatever the umask is
            except FileExistsError:
                continue
    except OSError as error:
        raise cannot("write to", images_dir(state), error) from error


def cannot(do: str, path: str, error: OSError) -> ImageError:
    """Return the ImageError for an OSError: what could not be done to which path, and what to do about it."""
    import errno

    hints = {
        errno.ENOSPC: "free some space there, or run: ringfence image prune",
        errno.EDQUOT: "free some space there, or run: ringfence image prune",
        errno.EROFS: "set RINGFENCE_STATE_DIR to a place that can be written",
        errno.EACCES: "run as its owner, or set RINGFENCE_STATE_DIR",
        errno.EPERM: "run as its owner, or set RINGFENCE_STATE_DIR",
    }
    return ImageError(
        f"cannot {do} {path}: {error.strerror or error}", hint=hints.get(error.errno or 0, "see --debug")
    )


@contextmanager
def locked(state: str, waiting: "Callable[[], None]" = lambda: None) -> "Iterator[None]":
    """Hold the lock of the store for a short change; `waiting` is called once if another has it."""
    make_store(state)
    with _flock(images_dir(state, "lock"), fcntl.LOCK_EX, waiting):
        yield


@contextmanager
def named(state: str, encoded: str, waiting: "Callable[[], None]" = lambda: None) -> "Iterator[int]":
    """Hold the lock of one name while its image is brought here, so that several at once do the work once.

    Yields its descriptor: a child that inherits it keeps the lock until it is gone too.
    """
    make_store(state)
    with _flock(images_dir(state, "locks", f"{encoded[:200]}.name"), fcntl.LOCK_EX, waiting) as descriptor:
        yield descriptor


@contextmanager
def working(state: str) -> "Iterator[None]":
    """Say that blobs and layers are on their way which no record names yet: nobody removes any meanwhile."""
    make_store(state)
    with _flock(images_dir(state, "locks", "working"), fcntl.LOCK_SH, lambda: None):
        yield


def nobody_works(state: str) -> "int | None":
    """Return a descriptor that keeps everybody from starting work until it is closed; None while someone works."""
    try:
        return try_lock(images_dir(state, "locks", "working"))
    except OSError as error:
        raise cannot("lock", images_dir(state), error) from error


def try_lock(path: str) -> "int | None":
    """Return a descriptor of the existing or new file `path` with the only lock on it, None when it has others."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def _flock(path: str, how: int, waiting: "Callable[[], None]") -> "Iterator[int]":
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise cannot("lock", path, error) from error
    try:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, how)
        yield descriptor
    finally:
        os.close(descriptor)


def resolve(state: str, name: str) -> str | None:
    """Return the manifest digest of the canonical `name`, or of the digest itself; None if it is not here."""
    from ringfence.image.reference import encode

    if is_digest(name):
        return name if os.path.exists(record_path(state, name)) else None
    try:
        target = os.path.basename(os.readlink(images_dir(state, "refs", encode(name))))
    except OSError:
        return None
    digest = target.removesuffix(".json").replace("sha256-", "sha256:", 1)
    return digest if is_digest(digest) and os.path.exists(record_path(state, digest)) else None


def read_record(state: str, digest: str) -> ImageRecord:
    """Return the record of the manifest `digest`. Raises ImageError when there is none or it is damaged."""
    path = record_path(state, digest)
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(_MAX_RECORD_BYTES), type=ImageRecord)
    except FileNotFoundError as error:
        raise ImageError(f"no image {digest}", hint="'ringfence image ls' lists them") from error
    except OSError as error:
        raise cannot("read", path, error) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ImageError(f"cannot read {path}: {error}", hint="pull the image again") from error
    if found.digest != digest:
        raise ImageError(f"{path} is the record of {found.digest}", hint="pull the image again")
    return found


def names(state: str) -> dict[str, str]:
    """Return {canonical name: manifest digest} of all names, in their order."""
    from ringfence.image.reference import decode

    found = {}
    for entry in sorted(entries(state, "refs")):
        name = decode(entry)
        digest = resolve(state, name)
        if digest is not None:
            found[name] = digest
    return found


def records(state: str) -> list[ImageRecord]:
    """Return the records of all images, with and without a name. Raises ImageError for a damaged one."""
    found = []
    for entry in sorted(entries(state, "images")):
        digest = entry.removesuffix(".json").replace("sha256-", "sha256:", 1)
        if is_digest(digest):
            found.append(read_record(state, digest))
    return found


def entries(state: str, *below: str) -> list[str]:
    """Return the finished entries of a directory of the store; a leading dot is on something unfinished."""
    try:
        return [entry for entry in os.listdir(images_dir(state, *below)) if not entry.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise cannot("read", images_dir(state, *below), error) from error


def write_file(path: str, data: bytes, mode: int) -> None:
    """Write a file whole or not at all, and durably; raises OSError."""
    temporary = os.path.join(os.path.dirname(path), f".new-{os.getpid()}-{os.urandom(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            os.fchmod(descriptor, mode)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def set_name(state: str, name: str, digest: str) -> None:
    """Let `name` mean the image `digest` from now on; the caller holds the lock. Raises OSError."""
    from ringfence.image.reference import encode

    encoded = encode(name)
    if len(encoded) > 255:
        raise ImageError(f"the name {name!r} is too long", hint="give the image a shorter one with --name")
    temporary = images_dir(state, "refs", f".new-{os.getpid()}-{os.urandom(4).hex()}")
    os.symlink(f"../images/{os.path.basename(record_path(state, digest))}", temporary)
    os.rename(temporary, images_dir(state, "refs", encoded))


def now() -> str:
    """Return the time in UTC as RFC 3339 writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
