"""A layer's blob as a stream of its uncompressed bytes, inflated and hashed by a thread of its own.

zlib, zstandard and hashlib let go of the interpreter's lock, so this goes on beside the extraction.
"""

import hashlib
import os
import queue
import stat
import threading
import zlib

from ringfence.errors import ImageError
from ringfence.image import limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

# Source: OCI image-spec, media-types.md and layer.md; Docker's image manifest v2 schema 2.
_OCI = "application/vnd.oci.image.layer."
_DOCKER = "application/vnd.docker.image.rootfs."
COMPRESSIONS = {
    f"{kind}{ending}": compression
    for kind, tar in (
        (f"{_OCI}v1.tar", "+"),
        (f"{_OCI}nondistributable.v1.tar", "+"),
        (f"{_DOCKER}diff.tar", "."),
        (f"{_DOCKER}foreign.diff.tar", "."),
    )
    for ending, compression in (("", "none"), (f"{tar}gzip", "gzip"), (f"{tar}zstd", "zstd"))
}
# Short input blocks: at the end of each member zlib copies what is left of one, and a member can be 20 bytes.
_BLOCK = 64 << 10
_CHUNK = 512 << 10
_QUEUED = 6
# What `zstd -d` allows without --memory: windows of 128 MiB.
_ZSTD_WINDOW_BYTES = 128 << 20


def compression_of(media_type: str) -> str:
    """Return "none", "gzip" or "zstd" for a layer's media type; raises ImageError for an unknown one."""
    try:
        return COMPRESSIONS[media_type]
    except KeyError:
        raise ImageError(
            f"a layer has the unknown media type {media_type[:200]!r}",
            hint="build the image with tar, gzip or zstd layers",
        ) from None


class BlobStream:
    """The uncompressed bytes of the file `path`; use it in a with statement.

    `position` counts the bytes taken so far. Every method raises ImageError for damaged or oversized input and
    OSError when the file cannot be read. After `finish`, `blob_digest` and `tar_digest` hold "sha256:..." of
    the whole file and of all its uncompressed bytes, and `tar_bytes` counts the latter.
    """

    def __init__(self, path: str, compression: str, bounds: limits.Limits = limits.DEFAULT) -> None:
        """Open `path`, a regular file; `compression` is "none", "gzip" or "zstd"."""
        # O_NONBLOCK: a FIFO in its place must not make us wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise ImageError(f"{path} is no regular file")
        self.position = 0
        self.blob_digest = ""
        self.tar_digest = ""
        self.tar_bytes = 0
        self.blob_bytes = found.st_size
        self.ceiling = bounds.ceiling(found.st_size)
        self._members = bounds.entries
        self._descriptor = descriptor
        self._blob_hash = hashlib.sha256()
        self._inflate = {"none": self._plain, "gzip": self._gunzip, "zstd": self._unzstd}[compression]
        self._queue: queue.Queue[bytes | BaseException] = queue.Queue(_QUEUED)
        self._stop = False
        self._ended = False
        self._chunk = memoryview(b"")
        self._thread = threading.Thread(target=self._work, name="inflate", daemon=True)

    def __enter__(self) -> "Self":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self._stop = True
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)  # makes room for what the thread is about to put there
            except queue.Empty:
                continue
        self._thread.join()
        os.close(self._descriptor)

    def take(self, size: int) -> memoryview:
        """Return the next bytes: at least one and at most `size`, none at the end."""
        if not self._chunk and not self._next():
            return self._chunk
        taken, self._chunk = self._chunk[:size], self._chunk[size:]
        self.position += len(taken)
        return taken

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes; fewer only at the end. The caller bounds `size`."""
        taken = bytes(self.take(size))
        while len(taken) < size:
            more = self.take(size - len(taken))
            if not more:
                break
            taken += more
        return taken

    def skip(self, size: int) -> None:
        """Pass over `size` bytes; raises ImageError when there are fewer."""
        while size > 0:
            passed = len(self.take(size))
            if not passed:
                raise ImageError("the archive ends in the middle of an entry")
            size -= passed

    def finish(self) -> None:
        """Read on to the end of the blob."""
        self.position += len(self._chunk)
        while self._next():
            self.position += len(self._chunk)

    def _next(self) -> bool:
        """Wait for the next chunk; False at the end."""
        if self._ended:
            return False
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._ended = True
            raise item
        self._chunk = memoryview(item)
        self._ended = not item
        return not self._ended

    def _work(self) -> None:
        try:
            tar_hash, total = hashlib.sha256(), 0
            for chunk in self._inflate():
                tar_hash.update(chunk)
                total += len(chunk)
                if total > self.ceiling:
                    raise ImageError(
                        f"the layer unpacks to more than {self.ceiling} bytes from {self.blob_bytes} compressed ones"
                    )
                self._queue.put(chunk)
                if self._stop:
                    return
            self.tar_bytes = total
            self.tar_digest = f"sha256:{tar_hash.hexdigest()}"
            self.blob_digest = f"sha256:{self._blob_hash.hexdigest()}"
            self._queue.put(b"")
        except BaseException as error:  # noqa: BLE001 - raised again by whoever reads the stream
            self._queue.put(error)

    def _blocks(self, size: int = _BLOCK) -> "Iterator[bytes]":
        while block := self._read_blob(size):
            yield block

    def _read_blob(self, size: int) -> bytes:
        block = os.read(self._descriptor, size)
        self._blob_hash.update(block)
        return block

    def _plain(self) -> "Iterator[bytes]":
        return self._blocks(_CHUNK)

    def _gunzip(self) -> "Iterator[bytes]":
        """Inflate one gzip member after the other, as gzip(1) does; anything else after one is an error."""
        try:
            yield from self._gunzip_members()
        except zlib.error as error:
            raise ImageError(f"the layer is no sound gzip stream: {error}") from error

    def _gunzip_members(self) -> "Iterator[bytes]":
        member, members, fresh = zlib.decompressobj(31), 1, True
        for block in self._blocks():
            data = block
            while data:
                if member.eof:
                    member, members = zlib.decompressobj(31), members + 1
                    if members > self._members:
                        raise ImageError(f"the layer has more than {self._members} gzip members")
                fresh = False
                if out := member.decompress(data, _CHUNK):
                    yield out
                data = member.unused_data if member.eof else member.unconsumed_tail
        while not member.eof and (out := member.decompress(b"", _CHUNK)):
            yield out
        if fresh or not member.eof:
            raise ImageError("the layer's gzip stream ends too early")

    def _unzstd(self) -> "Iterator[bytes]":
        try:
            import zstandard
        except ImportError as error:
            raise ImageError(
                "the layer is compressed with zstd, which this installation cannot read",
                hint="pip install zstandard",
            ) from error
        inflater = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        source = _Source(self._read_blob)
        try:
            # It asks no more of its source than `read`.
            with inflater.stream_reader(
                source,  # type: ignore[arg-type]
                read_size=_BLOCK,
                read_across_frames=True,
            ) as reader:
                while out := reader.read(_CHUNK):
                    yield out
        except zstandard.ZstdError as error:
            raise ImageError(f"the layer is no sound zstd stream: {error}") from error


class _Source:
    """What zstandard reads from: an object with `read`."""

    def __init__(self, read: "Callable[[int], bytes]") -> None:
        self.read = read
