"""Checks the store against itself: every blob hashed again, every unpacked layer compared with its archive."""

import fcntl
import os
from contextlib import contextmanager
from itertools import islice

import msgspec

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.compare import differences
from ringfence.image.layers import unpack
from ringfence.image.publish import check_blob
from ringfence.image.trees import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ringfence.image.record import ImageRecord, Layer

_MOST_LINES = 100  # of one layer


class Verified(msgspec.Struct, frozen=True):
    """What was looked at, and each thing that is not as it should be, in one line."""

    images: tuple[str, ...]
    blobs: int
    layers: int
    problems: tuple[str, ...]


def verify(
    state: str, records: "Iterable[ImageRecord]", *, say: "Callable[[str], None]" = lambda _: None
) -> Verified:
    """Hash all blobs of `records` and compare their unpacked layers with a fresh unpacking of the archives.

    Takes as much free space as the largest layer. Raises ImageError when it cannot look, not for what it finds.
    """
    images = list(records)
    blobs = sorted({digest for record in images for digest in record.blobs()})
    layers = {layer.diff_id: layer for record in images for layer in record.layers}
    problems: list[str] = []
    with store.working(state):
        broken = set()
        say(f"hashing {len(blobs)} blobs")
        for digest in blobs:
            problem = _blob(state, digest)
            if problem:
                broken.add(digest)
                problems.append(problem)
        for layer in layers.values():
            say(f"comparing layer {layer.diff_id}")
            if layer.digest in broken:
                problems.append(f"layer {layer.diff_id}: cannot be compared, its blob is broken")
            else:
                problems += _layer(state, layer)
    return Verified(tuple(record.digest for record in images), len(blobs), len(layers), tuple(problems))


def _blob(state: str, digest: str) -> str:
    try:
        return "" if check_blob(state, digest) else f"blob {digest}: another content"
    except FileNotFoundError:
        return f"blob {digest}: missing"
    except OSError as error:
        raise store.cannot("read", store.blob_path(state, digest), error) from error


def _layer(state: str, layer: "Layer") -> list[str]:
    files = os.path.join(store.layer_path(state, layer.diff_id), "fs")
    if not os.path.isdir(files):
        return [f"layer {layer.diff_id}: missing"]
    blob = store.blob_path(state, layer.digest)
    try:
        with _scratch(state) as place:
            try:
                unpack(place, blob, media_type=layer.media_type, digest=layer.digest, diff_id=layer.diff_id)
            except ImageError as error:
                return [f"layer {layer.diff_id}: {error.message}"]
            fresh = os.path.join(store.layer_path(place, layer.diff_id), "fs")
            lines = list(islice(differences(files, fresh), _MOST_LINES + 1))
    except OSError as error:
        raise store.cannot("compare", error.filename or files, error) from error
    more = [f"layer {layer.diff_id}: and more"] if len(lines) > _MOST_LINES else []
    return [f"layer {layer.diff_id}: {line}" for line in lines[:_MOST_LINES]] + more


@contextmanager
def _scratch(state: str) -> "Iterator[str]":
    """Make a store of our own for a moment; its lock tells `prune` that it is no leftover."""
    path = store.images_dir(state, f".verify-{os.getpid()}-{os.urandom(4).hex()}")
    os.mkdir(path, 0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        remove_tree(path)
        os.close(descriptor)
