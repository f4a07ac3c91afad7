"""Writes an image of the store as an OCI layout, in a directory or a tar, for skopeo, podman and others.

Source: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

import hashlib
import io
import os
import stat
import tarfile

import msgspec

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.manifest import MAX_BYTES, OCI_INDEX
from ringfence.image.publish import AGAIN, BrokenBlob
from ringfence.image.trees import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

    from ringfence.image.record import ImageRecord

_CHUNK = 1 << 20
_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
_REF_NAME = "org.opencontainers.image.ref.name"


def export_directory(state: str, record: "ImageRecord", directory: str, tag: str) -> None:
    """Write the image into the OCI layout at `directory`, which is made, or gets one more image called `tag`.

    Every blob is hashed on its way. Raises ImageError; what was there before stays as it was.
    """
    try:
        blobs = os.path.join(directory, "blobs", "sha256")
        index = _index_of(directory)
        made = index is None and not os.path.isdir(directory)
        try:
            os.makedirs(blobs, exist_ok=True)
            for digest in sorted(record.blobs()):
                path = os.path.join(blobs, digest.removeprefix("sha256:"))
                if not os.path.exists(path):
                    _copy_file(state, digest, path)
            _replace(os.path.join(directory, "oci-layout"), _LAYOUT)
            _replace(os.path.join(directory, "index.json"), _index(record, tag, index or []))
        except BaseException:
            if made:
                remove_tree(directory)
            raise
    except OSError as error:
        raise store.cannot("export to", error.filename or directory, error) from error


def _index_of(directory: str) -> list[dict[str, object]] | None:
    """Return the entries of the index of an OCI layout, None for a missing or empty directory."""
    if not os.path.lexists(directory) or (os.path.isdir(directory) and not os.listdir(directory)):
        return None
    try:
        with open(os.path.join(directory, "index.json"), "rb") as file:
            found = msgspec.json.decode(file.read(MAX_BYTES))
        entries = found["manifests"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("its index has no list of manifests")
    except (OSError, ValueError, TypeError, KeyError, msgspec.MsgspecError) as error:
        raise ImageError(
            f"{directory} is there and is no OCI layout", hint="give an empty or a new directory"
        ) from error
    return entries


def _index(record: "ImageRecord", tag: str, others: list[dict[str, object]]) -> bytes:
    entry: dict[str, object] = {
        "mediaType": record.manifest_media_type,
        "digest": record.digest,
        "size": record.manifest_size_bytes,
        "annotations": {_REF_NAME: tag},
        "platform": {
            "architecture": record.platform.architecture,
            "os": record.platform.os,
            **({"variant": record.platform.variant} if record.platform.variant else {}),
        },
    }
    kept = [other for other in others if _tag_of(other) != tag]
    return msgspec.json.encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*kept, entry]})


def _tag_of(entry: dict[str, object]) -> object:
    annotations = entry.get("annotations")
    return annotations.get(_REF_NAME) if isinstance(annotations, dict) else None


def _copy_file(state: str, digest: str, path: str) -> None:
    temporary = f"{path}.{os.getpid()}"
    try:
        with (
            _Blob(state, digest) as blob,
            open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as out,
        ):
            while block := blob.read(_CHUNK):
                out.write(block)
            blob.check()
        os.rename(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


class _Blob:
    """A blob being read, hashed on its way; use it in a with statement, and `check` it at its end."""

    def __init__(self, state: str, digest: str) -> None:
        try:
            self._file = open(store.blob_path(state, digest), "rb", buffering=0)  # noqa: SIM115 - see __exit__
        except FileNotFoundError as error:
            raise BrokenBlob(f"the blob {digest} is not here", hint=AGAIN) from error
        self.size_bytes = os.fstat(self._file.fileno()).st_size
        self._digest = digest
        self._hash = hashlib.sha256()

    def __enter__(self) -> "_Blob":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int = -1, /) -> bytes:
        block = self._file.read(size)
        self._hash.update(block)
        return block

    def check(self) -> None:
        if f"sha256:{self._hash.hexdigest()}" != self._digest:
            raise BrokenBlob(f"the blob {self._digest} is not what its name says", hint=AGAIN)


def _replace(path: str, data: bytes) -> None:
    temporary = f"{path}.{os.getpid()}"
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as out:
        out.write(data)
    os.rename(temporary, path)


def export_archive(state: str, record: "ImageRecord", path: str, tag: str) -> None:
    """Write the image as the tar of an OCI layout; the same image and tag give the same bytes. Raises ImageError."""
    temporary = f"{path}.{os.getpid()}"
    try:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            # Not only directories: a new file would take the place of /dev/null, too.
            raise ImageError(
                f"{path} is there and is no file", hint="an oci-archive is a file; oci: writes a directory"
            )
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with open(descriptor, "wb") as out:
                _write_archive(state, record, tag, out)
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise store.cannot("export to", path, error) from error


def _write_archive(state: str, record: "ImageRecord", tag: str, out: "IO[bytes]") -> None:
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("blobs", "blobs/sha256"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(directory)
        for digest in sorted(record.blobs()):
            info = tarfile.TarInfo(f"blobs/sha256/{digest.removeprefix('sha256:')}")
            with _Blob(state, digest) as blob:
                info.size = blob.size_bytes
                tar.addfile(info, blob)
                blob.check()
        for name, data in (("oci-layout", _LAYOUT), ("index.json", _index(record, tag, []))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
