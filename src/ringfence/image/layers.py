"""The store of unpacked layers: each once, under the digest of its uncompressed tar, whole or not at all.

images/layers/sha256-.../fs/          the files, in overlayfs form
images/layers/sha256-.../layer.json   what is known of them
images/layers/.unpacking-PID-.../     under way, or what a killed one left; whoever works in one holds its flock
images/layers/.lock-...               held while one process unpacks that layer and the others wait
"""

import fcntl
import os
import secrets
from contextlib import contextmanager, suppress

import msgspec

from ringfence.errors import ImageError
from ringfence.image import limits
from ringfence.image.archive import Extractor
from ringfence.image.blobs import BlobStream, compression_of
from ringfence.image.directories import remove_tree
from ringfence.image.store import cannot, images_dir, layer_path, make_store
from ringfence.image.tarstream import entries
from ringfence.linux.disk import sync_file_system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

_UNPACKING = ".unpacking-"
_LOCK = ".lock-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Layer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of an unpacked layer.

    size_bytes  of all its files; entries: files, directories and whiteouts
    owners      whether they have the owners that the archive says; unpacked by a user, they are all the user's
    root_only   whether nobody but root could change any of it, or gain anything by running it on the host
    """

    diff_id: str
    size_bytes: int
    entries: int
    owners: bool
    root_only: bool


def find(state: str, diff_id: str) -> Layer | None:
    """Return what is known of an unpacked layer, None when it is not there. Raises ImageError."""
    path = os.path.join(layer_path(state, diff_id), "layer.json")
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(1 << 16), type=Layer)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ImageError(f"cannot read {path}: {error}", hint="remove the image and pull it again") from error


def unpack(
    state: str,
    blob: str,
    *,
    media_type: str,
    digest: str,
    diff_id: str,
    bounds: limits.Limits = limits.DEFAULT,
) -> Layer:
    """Unpack the file `blob` into the store, unless the layer is there already.

    `digest` is that of the blob, `diff_id` that of the tar in it; both are worked out on the way, and nothing is
    kept unless both are right. Several processes at once do the work once. Raises ImageError.
    """
    final = layer_path(state, diff_id)
    compression = compression_of(media_type)
    home = images_dir(state, "layers")
    make_store(state)
    try:
        with _alone(f"{home}/{_LOCK}{os.path.basename(final)}"):
            found = find(state, diff_id)
            if found is None:
                with _workplace(home) as (place, lock):
                    found = _write_layer(
                        place, blob, compression, diff_id=diff_id, digest=digest, bounds=bounds
                    )
                    sync_file_system(lock)  # or a power cut could keep the name and lose the content
                    os.rename(place, final)
    except OSError as error:
        raise cannot("unpack into", home, error) from error
    except ImageError as error:
        raise ImageError(f"cannot unpack layer {digest}: {error.message}", hint=error.hint) from error
    return found


def _write_layer(
    place: str, blob: str, compression: str, *, diff_id: str, digest: str, bounds: limits.Limits
) -> Layer:
    """Unpack into the new directory `place` and write its layer.json."""
    owners = os.geteuid() == 0
    os.mkdir(f"{place}/fs", 0o700)
    root = os.open(f"{place}/fs", _DIRECTORY)
    try:
        with _unnamed(f"{place}/later") as later, BlobStream(blob, compression, bounds) as stream:
            extractor = Extractor(
                root, later, most_bytes=stream.ceiling, most_entries=bounds.entries, owners=owners
            )
            try:
                for entry in entries(stream, bounds):
                    extractor.extract(entry, stream)
                stream.finish()
                _compare("blob", stream.blob_digest, digest)
                _compare("uncompressed layer", stream.tar_digest, diff_id)
                extractor.finish()
            finally:
                extractor.close()
    finally:
        os.close(root)
    layer = Layer(
        diff_id=diff_id,
        size_bytes=extractor.size_bytes,
        entries=extractor.entries,
        owners=owners,
        root_only=extractor.root_only,
    )
    with open(f"{place}/layer.json", "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(msgspec.json.encode(layer) + b"\n")
    return layer


def _compare(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise ImageError(
            f"its {what} has the digest {found}, not {wanted}",
            hint="it is damaged or was tampered with: pull the image again",
        )


def share(state: str, diff_id: str) -> None:
    """Let every user of the host read an unpacked layer, as the images that root makes for all need it.

    Raises ImageError for a layer that is not there, or in which somebody else than root could change files.
    """
    layer = find(state, diff_id)
    if layer is None or not layer.root_only or os.geteuid() != 0:
        raise ImageError(
            f"layer {diff_id} cannot be shared with all users",
            hint="only root's own, without files of others, writable for others, or with capabilities",
        )
    os.chmod(layer_path(state, diff_id), 0o755)  # noqa: S103 - see above


@contextmanager
def _workplace(home: str) -> "Iterator[tuple[str, int]]":
    """Make a directory in `home` to unpack in, locked as long as we work; yield its path and descriptor.

    What is not renamed away is removed. Raises OSError.
    """
    place, lock = _locked_place(home)
    try:
        yield place, lock
    finally:
        parent = os.open(home, _DIRECTORY)
        with suppress(FileNotFoundError):
            remove_tree(parent, os.fsencode(os.path.basename(place)))
        os.close(parent)
        os.close(lock)


def _locked_place(home: str) -> tuple[str, int]:
    while True:
        place = f"{home}/{_UNPACKING}{os.getpid()}-{secrets.token_hex(4)}"
        os.mkdir(place, 0o700)
        with suppress(FileNotFoundError):  # swept before we could lock it: once more
            lock = os.open(place, _DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
            else:
                return place, lock


@contextmanager
def _alone(path: str) -> "Iterator[None]":
    """Hold the lock file `path`, which goes again with us."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                break
        os.close(lock)  # whoever had it has removed it: what is there now is another one
    try:
        yield
    finally:
        os.unlink(path)
        os.close(lock)


@contextmanager
def _unnamed(path: str) -> "Iterator[IO[bytes]]":
    """Open a new file that is gone once it is closed."""
    with open(path, "x+b") as file:
        os.unlink(path)
        yield file
