"""Taking the kernel itself, an ELF file, out of a bzImage, in which it is compressed.

Source: https://docs.kernel.org/arch/x86/boot.html
"""

import bz2
import lzma
import shutil
import struct
import subprocess
import tempfile
import zlib

from ringfence.errors import HostError
from ringfence.runtime.microvm.kernels.elf import MOST_KERNEL_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SETUP_SECTS, _BOOT_FLAG, _MAGIC, _VERSION = 0x1F1, 0x1FE, 0x202, 0x206
_PAYLOAD_OFFSET = 0x248  # and behind it payload_length
_OLDEST_PROTOCOL = 0x0208  # the first with these two
_SECTOR = 512


def unpack(image: bytes, path: str) -> bytes:
    """Return the vmlinux in `image`, the content of the bzImage at `path`. Raises HostError.

    At most MOST_KERNEL_BYTES come out, and just as many as the image promises.
    """
    payload, size_bytes = _payload(image, path)
    for magic, name, decompress in _FORMATS:
        if payload.startswith(magic):
            try:
                data = decompress(payload, size_bytes)
            except (lzma.LZMAError, zlib.error, OSError, EOFError, ValueError) as error:
                raise HostError(f"{path} cannot be unpacked as {name}: {error}") from error
            if len(data) != size_bytes:
                raise HostError(f"{path} is damaged: {len(data)} bytes came out of it, not {size_bytes}")
            return data
    raise HostError(f"{path} is compressed in a way that is not known: {payload[:6].hex()}")


def _payload(image: bytes, path: str) -> tuple[bytes, int]:
    """Return the compressed kernel and its size in bytes when it is uncompressed."""
    if (
        len(image) < 1024
        or image[_BOOT_FLAG : _BOOT_FLAG + 2] != b"\x55\xaa"
        or image[_MAGIC:][:4] != b"HdrS"
    ):
        raise HostError(f"{path} is not a bzImage")
    (version,) = struct.unpack_from("<H", image, _VERSION)
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_OFFSET)
    start = ((image[_SETUP_SECTS] or 4) + 1) * _SECTOR + offset
    if version < _OLDEST_PROTOCOL or length < 8 or start + length > len(image):
        raise HostError(f"{path} is not a bzImage of any recent kernel, or not a whole one")
    payload = image[start : start + length]
    (size_bytes,) = struct.unpack("<I", payload[-4:])
    if size_bytes > MOST_KERNEL_BYTES:
        raise HostError(f"{path} says that it holds {size_bytes} bytes, more than {MOST_KERNEL_BYTES}")
    # A gzip file ends with this number anyway; behind all others the kernel's build has put it.
    return payload if payload[:2] == b"\x1f\x8b" else payload[:-4], size_bytes


def _gzip(payload: bytes, size_bytes: int) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(payload, size_bytes + 1)


def _lzma(payload: bytes, size_bytes: int) -> bytes:
    return lzma.LZMADecompressor().decompress(payload, size_bytes + 1)


def _bzip2(payload: bytes, size_bytes: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(payload, size_bytes + 1)


def _zstd(payload: bytes, size_bytes: int) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor(max_window_size=MOST_KERNEL_BYTES).stream_reader(payload) as reader:
            return reader.read(size_bytes + 1)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _lz4(payload: bytes, size_bytes: int) -> bytes:
    """Neither Python nor our packages have this one; Debian's kernels are compressed with it."""
    program = shutil.which("lz4")
    if program is None:
        raise HostError(
            "lz4 is not installed, and the kernel is compressed with it", hint="apt-get install lz4"
        )
    with tempfile.TemporaryFile() as packed:
        packed.write(payload)
        packed.seek(0)
        command = [program, "-d", "-c", "-q"]
        with subprocess.Popen(
            command, stdin=packed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/"
        ) as process:
            assert process.stdout is not None  # noqa: S101 - for the type checker: it is a pipe
            try:
                return process.stdout.read(size_bytes + 1)
            finally:
                process.kill()


_FORMATS: "tuple[tuple[bytes, str, Callable[[bytes, int], bytes]], ...]" = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\xfd7zXZ\0", "xz", _lzma),
    (b"\x5d\0\0", "lzma", _lzma),
    (b"BZh", "bzip2", _bzip2),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (b"\x02\x21\x4c\x18", "lz4", _lz4),
)
