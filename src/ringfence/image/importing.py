"""Makes an image of one layer: from a directory, a tar, or whatever writes a tar."""

import hashlib
import os
import stat
import sys
from contextlib import contextmanager

import msgspec

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.manifest import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, host_platform, parse_platform
from ringfence.image.model import PATH
from ringfence.image.publish import add_blob, publish
from ringfence.image.removal import forget_blobs
from ringfence.image.tarball import write_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

    from ringfence.image.record import ImageRecord

_CHUNK = 1 << 20
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


def import_directory(
    state: str,
    directory: str,
    name: str,
    *,
    platform: str = "",
    say: "Callable[[str], None]" = lambda _: None,
) -> "ImageRecord":
    """Make the image `name` of all below `directory`; the same tree gives the same digest. Raises ImageError."""
    with making(state) as work:
        say(f"reading {directory}")
        try:
            layer = work.plain_layer(lambda out: write_tree(directory, out, say=say))
        except OSError as error:
            raise store.cannot("import", error.filename or directory, error) from error
        return work.image(name, layer, source=f"dir:{directory}", platform=platform, say=say)


def import_tar(
    state: str, path: str, name: str, *, platform: str = "", say: "Callable[[str], None]" = lambda _: None
) -> "ImageRecord":
    """Make the image `name` of the tar at `path`, plain or packed with gzip or zstd; "-" is standard input.

    The layer is the file as it is. Raises ImageError.
    """
    shown = "standard input" if path == "-" else path
    with making(state) as work:
        say(f"reading {shown}")
        try:
            with _opened(path) as source:
                layer = work.packed_layer(source)
        except OSError as error:
            raise store.cannot("import", shown, error) from error
        return work.image(name, layer, source=shown, platform=platform, say=say)


def import_image(
    state: str,
    source: str,
    name: str,
    *,
    platform: str = "",
    say: "Callable[[str], None]" = lambda _: None,
) -> "tuple[ImageRecord, str]":
    """Take over the image `source` of another tool ("oci:DIR:TAG"); return its record and name.

    `name` "" calls it as it was written. Raises ImageError.
    """
    from ringfence.image.pull import pull
    from ringfence.image.reference import canonical, parse

    reference = parse(source)
    name = name or canonical(reference)
    return pull(state, reference, name=name, platform=platform, say=say), name


def _opened(path: str) -> "IO[bytes]":
    if path == "-":
        return sys.stdin.buffer
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not make us wait
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError(
            f"{path} is no regular file", hint="give a tar, a directory, or - for standard input"
        )
    return open(descriptor, "rb", buffering=0)


class Made(msgspec.Struct, frozen=True):
    """A layer that lies in the store as a blob; see ringfence.image.record.Layer."""

    digest: str
    diff_id: str
    size_bytes: int
    media_type: str


@contextmanager
def making(state: str) -> "Iterator[Making]":
    """Make an image in the store of `state`; of one that comes to nothing, nothing is left. Raises ImageError."""
    work = Making(state)
    try:
        with store.working(state):
            yield work
    except BaseException:
        forget_blobs(state, work.blobs)
        raise


class Making:
    """An image in the making. `blobs` are the digests of what was put into the store for it."""

    def __init__(self, state: str) -> None:
        """Work in the store of `state`; use `making`."""
        self.blobs: list[str] = []
        self._state = state

    def plain_layer(self, write: "Callable[[IO[bytes]], object]") -> Made:
        """Keep what `write` writes, a tar, as a layer. Raises OSError and what `write` raises.

        It is not compressed: its digest then depends on no version of zlib.
        """
        with self._new_blob() as (file, path):
            out = _Hashing(file)
            write(out)  # type: ignore[arg-type]
            digest = f"sha256:{out.digest.hexdigest()}"
            self._keep(file, path, digest)
        return Made(digest, digest, out.size_bytes, OCI_LAYER)

    def packed_layer(self, source: "IO[bytes]") -> Made:
        """Keep all of `source`, a tar that may be packed with gzip or zstd, as a layer. Raises OSError, ImageError."""
        from ringfence.image.blobs import BlobStream

        with self._new_blob() as (file, path):
            begin = b""
            while chunk := source.read(_CHUNK):
                begin = begin or chunk[:4]
                _write(file, chunk)
            packed = next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), "none")
            with BlobStream(path, packed) as stream:
                stream.finish()
            self._keep(file, path, stream.blob_digest)
        ending = "" if packed == "none" else f"+{packed}"
        return Made(stream.blob_digest, stream.tar_digest, stream.blob_bytes, OCI_LAYER + ending)

    @contextmanager
    def _new_blob(self) -> "Iterator[tuple[IO[bytes], str]]":
        path = store.images_dir(self._state, "blobs/sha256", f".import-{os.getpid()}-{os.urandom(4).hex()}")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                yield file, path
        finally:
            if os.path.lexists(path):
                os.unlink(path)

    def _keep(self, file: "IO[bytes]", path: str, digest: str) -> None:
        os.fsync(file.fileno())
        os.rename(path, store.blob_path(self._state, digest))
        self.blobs.append(digest)

    def image(
        self,
        name: str,
        layer: Made,
        *,
        source: str,
        platform: str = "",
        made_by: str = "ringfence image import",
        command: tuple[str, ...] = (),
        env: tuple[str, ...] = (f"PATH={PATH}",),
        shared: bool = False,
        say: "Callable[[str], None]" = lambda _: None,
    ) -> "ImageRecord":
        """Write configuration and manifest for `layer` and publish the image `name`; see ringfence.image.publish.

        Nothing in them says when, so that the same layer is the same image. Raises ImageError.
        """
        where = parse_platform(platform) if platform else host_platform()
        config = {
            "architecture": where.architecture,
            "os": where.os,
            **({"variant": where.variant} if where.variant else {}),
            "config": {"Env": list(env), **({"Cmd": list(command)} if command else {})},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
            "history": [{"created_by": made_by}],
        }
        about = self._descriptor(OCI_CONFIG, config)
        blob = {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size_bytes}
        manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": about, "layers": [blob]}
        digest = str(self._descriptor(OCI_MANIFEST, manifest)["digest"])
        return publish(self._state, name, digest, source=source, platform=str(where), shared=shared, say=say)

    def _descriptor(self, media_type: str, document: object) -> dict[str, object]:
        data = msgspec.json.encode(document)
        try:
            digest = add_blob(self._state, data)
        except OSError as error:
            raise store.cannot("write to", store.images_dir(self._state), error) from error
        self.blobs.append(digest)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}


class _Hashing:
    """What tarfile writes a stream into."""

    def __init__(self, file: "IO[bytes]") -> None:
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self._file = file

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size_bytes += len(data)
        _write(self._file, data)
        return len(data)


def _write(file: "IO[bytes]", data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
