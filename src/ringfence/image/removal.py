"""Removes images, and what of the store no image needs any more; never what a sandbox uses or a pull brings.

What goes is moved into a directory of its own under the lock, in no time, and emptied after that.
"""

import fcntl
import os
from contextlib import contextmanager

import msgspec

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.disks import disk_path
from ringfence.image.hold import take_away
from ringfence.image.trees import remove_tree, size_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ringfence.image.record import ImageRecord

_TRASH = ".trash-"
_SHARED = ("blobs/sha256", "layers")  # what a pull may be bringing, or counting on
_BUSY = "an image is being brought here just now: its layers and blobs are left for 'ringfence image prune'"


class Removed(msgspec.Struct, frozen=True, kw_only=True):
    """What went: names, manifest digests, and how many layers, blobs, disk images and unfinished works.

    `note` says what had to stay, and why.
    """

    names: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    layers: int = 0
    blobs: int = 0
    disks: int = 0
    unfinished: int = 0
    freed_bytes: int = 0
    note: str = ""


def remove(state: str, name: str, *, waiting: "Callable[[], None]" = lambda: None) -> Removed:
    """Remove the canonical `name`, and its image if that was the last; a digest goes with all its names.

    Raises ImageError when there is none, or when the image would go while a sandbox uses it.
    """
    with _explained(state), _trash(state) as trash:
        with store.locked(state, waiting):
            digest = store.resolve(state, name)
            if digest is None:
                raise ImageError(f"no image {name!r}", hint="'ringfence image ls' lists them")
            all_names = [other for other, found in store.names(state).items() if found == digest]
            if name != digest and len(all_names) > 1:
                _unname(state, [name])
                return Removed(names=(name,))
            record = store.read_record(state, digest)
            if not _drop(state, digest, all_names):
                raise ImageError(
                    f"the image {name!r} is in use by a sandbox",
                    hint="stop it first; 'ringfence ps' lists them",
                )
            removed = trash.take(_parts(state, [record]))
        return msgspec.structs.replace(removed, names=tuple(all_names), images=(digest,))


def prune(state: str, *, waiting: "Callable[[], None]" = lambda: None) -> Removed:
    """Remove images without a name that no sandbox uses, and all that no image needs. Raises ImageError."""
    with _explained(state), _trash(state) as trash:
        with store.locked(state, waiting):
            named = set(store.names(state).values())
            unnamed = [record.digest for record in store.records(state) if record.digest not in named]
            gone = tuple(digest for digest in unnamed if _drop(state, digest, []))
            everything = {kind: set(store.entries(state, kind)) for kind in (*_SHARED, "disks")}
            removed = trash.take(everything, leftovers=True)
        return msgspec.structs.replace(removed, images=gone)


def forget_blobs(state: str, digests: "Iterable[str]") -> None:
    """Remove blobs that were brought for an image that came to nothing, unless another image needs them."""
    free = {os.path.basename(store.blob_path(state, digest)) for digest in digests}
    with _explained(state), _trash(state) as trash, store.locked(state):
        trash.take({"blobs/sha256": free, "layers": set(), "disks": set()})


@contextmanager
def _explained(state: str) -> "Iterator[None]":
    try:
        yield
    except OSError as error:
        raise store.cannot("remove", error.filename or store.images_dir(state), error) from error


def _drop(state: str, digest: str, names: list[str]) -> bool:
    """Remove the names and the record of an image, in this order; False, and nothing is done, when it is in use."""
    path = store.record_path(state, digest)
    descriptor = take_away(path)
    if descriptor < 0:
        return False
    try:
        _unname(state, names)
        os.unlink(path)
    finally:
        os.close(descriptor)
    return True


def _unname(state: str, names: list[str]) -> None:
    from ringfence.image.reference import encode

    for name in names:
        os.unlink(store.images_dir(state, "refs", encode(name)))


def _parts(state: str, records: "Iterable[ImageRecord]") -> dict[str, set[str]]:
    """Return the entries of each directory of the store that the images of `records` are made of."""
    parts: dict[str, set[str]] = {"blobs/sha256": set(), "layers": set(), "disks": set()}
    for record in records:
        parts["blobs/sha256"] |= {
            os.path.basename(store.blob_path(state, digest)) for digest in record.blobs()
        }
        parts["layers"] |= {
            os.path.basename(store.layer_path(state, layer.diff_id)) for layer in record.layers
        }
        parts["disks"].add(os.path.basename(disk_path(state, record)))
    return parts


class _Trash:
    """A directory for what is to be removed; all of `take` happens under the lock."""

    def __init__(self, state: str, path: str) -> None:
        self.state = state
        self.path = path
        self._count = 0

    def take(self, candidates: dict[str, set[str]], *, leftovers: bool = False) -> Removed:
        """Take those of `candidates` that no record needs, and `leftovers` of work that was killed."""
        kept = store.records(self.state)
        needed = _parts(self.state, kept)
        quiet = store.nobody_works(self.state)
        try:
            kinds = ["disks", *(_SHARED if quiet is not None else ())]
            free = {kind: candidates[kind] - needed[kind] for kind in kinds}
            unfinished = self._unfinished() if leftovers and quiet is not None else []
            freed_bytes = 0
            for kind, found in free.items():
                for entry in sorted(found):
                    freed_bytes += self._move(store.images_dir(self.state, kind, entry))
            for path in [*unfinished, *self._stale_marks({record.digest for record in kept})]:
                freed_bytes += self._move(path)
        finally:
            if quiet is not None:
                os.close(quiet)
        return Removed(
            layers=len(free.get("layers", ())),
            blobs=len(free.get("blobs/sha256", ())),
            disks=len(free["disks"]),
            unfinished=len(unfinished),
            freed_bytes=freed_bytes,
            note="" if quiet is not None else _BUSY,
        )

    def _move(self, path: str) -> int:
        try:
            size = size_bytes(path)
            os.rename(path, os.path.join(self.path, str(self._count)))
        except FileNotFoundError:  # a rest that another command has removed meanwhile
            return 0
        self._count += 1
        return size

    def _stale_marks(self, digests: set[str]) -> list[str]:
        """Return the notes of rules.py about images that are gone; each begins with the digits of a digest."""
        marks = store.entries(self.state, "verified")
        stale = [mark for mark in marks if f"sha256:{mark.partition('-')[0]}" not in digests]
        return [store.images_dir(self.state, "verified", mark) for mark in stale]

    def _unfinished(self) -> list[str]:
        """Return what begins with a dot, or does not belong in its directory, and that nobody holds a lock on."""
        found = []
        for kind in ("", "blobs", "blobs/sha256", "layers", "images", "refs", "disks"):
            directory = store.images_dir(self.state, kind).rstrip("/")
            for entry in os.listdir(directory):
                path = os.path.join(directory, entry)
                if (entry.startswith(".") or _stray(kind, entry)) and path != self.path and not _held(path):
                    found.append(path)
        return found


def _stray(kind: str, entry: str) -> bool:
    """Say whether no finished entry of this directory is called so."""
    if kind == "":
        return entry not in {*store.DIRECTORIES, "lock"}
    if kind == "blobs":
        return entry != "sha256"
    if kind == "blobs/sha256":
        return not store.is_digest(f"sha256:{entry}")
    if kind == "layers":
        return not store.is_digest(entry.replace("sha256-", "sha256:", 1))
    return False


def _held(path: str) -> bool:
    """Say whether whoever made this unfinished thing still lives."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _trash(state: str) -> "Iterator[_Trash]":
    store.make_store(state)
    path = store.images_dir(state, f"{_TRASH}{os.getpid()}-{os.urandom(4).hex()}")
    os.mkdir(path, 0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield _Trash(state, path)
        finally:
            remove_tree(path)
    finally:
        os.close(descriptor)
