"""Builds tar archives byte by byte, sound and hostile ones, and unpacks them into a layer store of the test's own."""

import gzip
import hashlib
from collections.abc import Iterable
from pathlib import Path

import zstandard

from ringfence.image import layers, limits
from ringfence.image.store import images_dir, layer_path

BLOCK = 512
END = bytes(2 * BLOCK)
TAR = "application/vnd.oci.image.layer.v1.tar"
USTAR, GNU = b"ustar\x0000", b"ustar  \0"


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def binary(value: int, width: int) -> bytes:
    """GNU's form of a number that does not fit: two's complement, first bit set."""
    raw = bytearray(value.to_bytes(width, "big", signed=True))
    raw[0] |= 0x80
    return bytes(raw)


def header(
    name: bytes,
    *,
    kind: bytes = b"0",
    size: int | bytes = 0,
    link: bytes = b"",
    mode: int = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 0,
    magic: bytes = USTAR,
    patches: dict[int, bytes] | None = None,
    checksum: int | None = None,
) -> bytes:
    """One header; numbers given as bytes are put in as they are, `patches` at their offsets."""

    def number(value: int | bytes, width: int) -> bytes:
        return value if isinstance(value, bytes) else octal(value, width)

    raw = bytearray(BLOCK)
    fields = {
        0: name,
        100: octal(mode, 8),
        108: number(uid, 8),
        116: number(gid, 8),
        124: number(size, 12),
        136: number(mtime, 12),
        148: b" " * 8,
        156: kind,
        157: link,
        257: magic,
    }
    for at, value in (fields | (patches or {})).items():
        raw[at : at + len(value)] = value
    raw[148:156] = b"%06o\0 " % (sum(raw) if checksum is None else checksum)
    assert len(raw) == BLOCK
    return bytes(raw)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def file(name: bytes, content: bytes = b"", **fields: object) -> bytes:
    return header(name, size=len(content), **fields) + padded(content)  # type: ignore[arg-type]


def directory(name: bytes, mode: int = 0o755, **fields: object) -> bytes:
    return header(name, kind=b"5", mode=mode, **fields)  # type: ignore[arg-type]


def symlink(name: bytes, target: bytes) -> bytes:
    return header(name, kind=b"2", link=target, mode=0o777)


def hard_link(name: bytes, target: bytes) -> bytes:
    return header(name, kind=b"1", link=target)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(b"%d" % length):
        length = len(rest) + len(b"%d" % length)
    return b"%d" % length + rest


def pax(records: Iterable[tuple[bytes, bytes]]) -> bytes:
    """An extended header for the entry that follows."""
    return file(b"pax", b"".join(record(key, value) for key, value in records), kind=b"x")


def long_name(name: bytes) -> bytes:
    return file(b"././@LongLink", name + b"\0", kind=b"L", magic=GNU)


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Store:
    """A state directory of its own, with what a test asks of it."""

    def __init__(self, directory: Path) -> None:
        self.state = str(directory / "state")
        self.blobs = directory / "given"
        Path(self.state).mkdir()
        self.blobs.mkdir()

    def unpack(
        self,
        tar: bytes,
        *,
        compression: str = "",
        blob: bytes | None = None,
        blob_digest: str = "",
        diff_id: str = "",
        bounds: limits.Limits = limits.DEFAULT,
    ) -> Path:
        """Unpack `tar`, or what `blob` holds of it, as a layer; return the directory of its files."""
        if blob is None:
            blob = {
                "": lambda: tar,
                "gzip": lambda: gzip.compress(tar, 6),
                "zstd": lambda: zstandard.compress(tar),
            }[compression]()
        path = self.blobs / "blob"
        path.write_bytes(blob)
        wanted = diff_id or digest(tar)
        layers.unpack(
            self.state,
            str(path),
            media_type=f"{TAR}{'+' if compression else ''}{compression}",
            digest=blob_digest or digest(blob),
            diff_id=wanted,
            bounds=bounds,
        )
        return Path(layer_path(self.state, wanted), "fs")

    def content(self) -> list[str]:
        """What is in the directory of the layers: nothing unfinished may stay there."""
        home = Path(images_dir(self.state, "layers"))
        return sorted(path.name for path in home.iterdir()) if home.exists() else []
