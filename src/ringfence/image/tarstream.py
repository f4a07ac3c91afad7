"""Reads a tar archive as a stream of entries, in bytes and in bounded memory, and writes nothing.

Why not `tarfile`: it reads extended headers and sparse maps of any size into memory and searches them with
patterns that take quadratic time, keeps every entry, and fixes for that come with Python, which is not ours to
update. Where readers disagree about a broken archive this one sides with Go's archive/tar, which the other
container tools use, so that an image means the same here as there; the tests hold it against other readers.
Source: pax(1) of POSIX.1-2017; "Basic Tar Format" of the GNU tar manual.
"""

from ringfence.errors import ImageError
from ringfence.image import limits
from ringfence.image.tarsparse import SparseMap, map_in_data, old_gnu_map, pax_map

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Protocol

    class Stream(Protocol):
        """What an archive is read from; see BlobStream."""

        position: int

        def read(self, size: int) -> bytes: ...
        def skip(self, size: int) -> None: ...


BLOCK = 512
_ZERO = bytes(BLOCK)

FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_OLD_FILE, _CONTIGUOUS, _SPARSE = b"\0", b"7", b"S"
_LONG_LINK, _LONG_NAME, _PAX, _PAX_GLOBAL = b"K", b"L", b"x", b"g"
_FILES = (FILE, _OLD_FILE, _CONTIGUOUS, _SPARSE)
_KINDS = (FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO)
_XATTR = b"SCHILY.xattr."
_MOST_SECONDS = 1 << 40  # the year 36812; every file system's range ends before
_NS = 1_000_000_000


class Entry:
    """One entry as the archive has it: nothing is cleaned or judged yet.

    kind      FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY or FIFO
    size      bytes of the file, holes included; stored: bytes of it that follow in the stream
    sparse    where the stored bytes belong, (offset, length) in order; None for a file without holes
    link      the target of a link
    """

    __slots__ = (
        "gid",
        "kind",
        "link",
        "mode",
        "mtime_ns",
        "name",
        "size",
        "sparse",
        "stored",
        "uid",
        "xattrs",
    )

    def __init__(self, name: bytes, kind: bytes, link: bytes = b"") -> None:
        """Make an empty file or whatever `kind` says."""
        self.name = name
        self.kind = kind
        self.link = link
        self.mode = 0o644
        self.uid = 0
        self.gid = 0
        self.mtime_ns = 0
        self.size = 0
        self.stored = 0
        self.sparse: SparseMap | None = None
        self.xattrs: dict[bytes, bytes] = {}


def entries(stream: "Stream", bounds: limits.Limits = limits.DEFAULT) -> "Iterator[Entry]":
    """Yield each entry of the archive; its data may then be read from `stream`, up to `Entry.stored` bytes.

    Ends at the end of the archive, which need not be that of the stream. Raises ImageError for an archive that is
    broken or passes `bounds`.
    """
    count = 0
    extended = _Extended()
    while header := _header(stream):
        kind = header[156:157]
        if kind in (_PAX, _LONG_NAME, _LONG_LINK):
            size = _number(header[124:136], "size")
            extended.add(kind, _payload(stream, size, bounds.header_bytes))
            continue
        if kind == _PAX_GLOBAL:  # of no meaning to Go's readers, so to nobody's images
            stream.skip(_padded(_number(header[124:136], "size")))
            continue
        count += 1
        if count > bounds.entries:
            raise ImageError(f"the layer has more than {bounds.entries} entries")
        entry = _entry(header, extended, stream, bounds.header_bytes)
        extended = _Extended()
        end = stream.position + _padded(entry.stored)
        yield entry
        stream.skip(end - stream.position)
    if extended:
        raise ImageError("the archive ends after an extended header")


class _Extended:
    """What the headers before an entry say about it."""

    __slots__ = ("link", "name", "pairs", "records")

    def __init__(self) -> None:
        self.name = self.link = b""
        self.records: dict[bytes, bytes] = {}
        self.pairs: list[bytes] = []  # of GNU's first sparse format, the one that repeats keys

    def __bool__(self) -> bool:
        return bool(self.name or self.link or self.records)

    def add(self, kind: bytes, payload: bytes) -> None:
        if kind == _LONG_NAME:
            self.name = payload.partition(b"\0")[0]
        elif kind == _LONG_LINK:
            self.link = payload.partition(b"\0")[0]
        else:
            self.records, self.pairs = _pax_records(payload)


def _header(stream: "Stream") -> bytes:
    """Return the next header, b"" at the end of the archive."""
    header = stream.read(BLOCK)
    if header == _ZERO:
        if stream.read(BLOCK).strip(b"\0"):
            raise ImageError("the archive goes on after a block that should end it")
        return b""
    if not header:
        return b""
    if len(header) < BLOCK:
        raise ImageError("the archive ends in the middle of a header")
    said = _number(header[148:156], "checksum")
    # The field itself counts as eight spaces. Some old writers added up signed bytes.
    rest = header[:148] + header[156:]
    total = sum(rest) + 256
    if said != total and said != total - 256 * sum(byte > 127 for byte in rest):
        raise ImageError("a header of the archive has a wrong checksum")
    return header


def _entry(header: bytes, extended: _Extended, stream: "Stream", header_bytes: int) -> Entry:
    kind = header[156:157]
    records = extended.records
    name = extended.name or records.get(b"path") or _name(header)
    link = extended.link or records.get(b"linkpath") or _text(header[157:257])
    entry = Entry(name, kind, link)
    try:
        if kind in _FILES:
            entry.kind = DIRECTORY if kind == _OLD_FILE and name.endswith(b"/") else FILE
        elif kind not in _KINDS:
            raise ImageError(f"it is of the unknown type {kind!r}")
        entry.mode = _number(header[100:108], "mode") & 0o7777
        entry.uid = _owner(records.get(b"uid"), header[108:116], "uid")
        entry.gid = _owner(records.get(b"gid"), header[116:124], "gid")
        entry.mtime_ns = _mtime(records.get(b"mtime"), header[136:148])
        if entry.kind == FILE:  # whatever a header says, nothing else has content
            given = records.get(b"size")
            entry.size = entry.stored = _decimal(given, "size") if given else _number(header[124:136], "size")
            _find_holes(entry, header, extended, stream, header_bytes)
        if (
            b"\0" in entry.name or b"\0" in link
        ):  # the map of a file with holes may have given it another name
            raise ImageError("its name or target has a NUL byte")
        if records:
            for key, value in records.items():
                if key.startswith(_XATTR):
                    entry.xattrs[key[len(_XATTR) :]] = value
    except ImageError as error:
        raise ImageError(f"entry {shown(entry.name)}: {error.message}") from None
    return entry


def _find_holes(
    entry: Entry, header: bytes, extended: _Extended, stream: "Stream", header_bytes: int
) -> None:
    """Find the map of a file with holes, in whichever of GNU's four formats it is."""
    records = extended.records
    if header[156:157] == _SPARSE:
        entry.sparse = old_gnu_map(header, stream, _number, header_bytes)
        entry.size = _number(header[483:495], "real size")
    elif records.get(b"GNU.sparse.major") == b"1":
        entry.name = records.get(b"GNU.sparse.name") or entry.name
        entry.size = _decimal(records.get(b"GNU.sparse.realsize", b""), "real size")
        entry.sparse, taken = map_in_data(stream, entry.stored, header_bytes)
        entry.stored -= taken
    elif b"GNU.sparse.map" in records or extended.pairs:
        entry.name = records.get(b"GNU.sparse.name") or entry.name
        entry.size = _decimal(records.get(b"GNU.sparse.size", b""), "real size")
        entry.sparse = pax_map(records, extended.pairs)
    else:
        return
    entry.sparse.check(entry.size, entry.stored)


def _name(header: bytes) -> bytes:
    name = _text(header[0:100])
    if header[257:263] != b"ustar\0":  # GNU's own format has times where ustar has a prefix
        return name
    # Jörg Schilling's star keeps times at the end of the prefix, and says so in the last bytes.
    prefix = _text(header[345:476] if header[508:512] == b"tar\0" else header[345:500])
    return prefix + b"/" + name if prefix else name


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _owner(record: bytes | None, field: bytes, what: str) -> int:
    return _decimal(record, what) if record else _number(field, what)


def _mtime(record: bytes | None, field: bytes) -> int:
    if not record:
        nanoseconds = _number(field, "mtime", signed=True) * _NS
    else:
        whole, _, fraction = record.partition(b".")
        digits = whole.removeprefix(b"-")
        if not digits.isdigit() or len(digits) > 20 or (fraction and not fraction.isdigit()):
            raise ImageError(f"its mtime {record[:40]!r} is no time")
        nanoseconds = int(digits) * _NS + int(fraction[:9].ljust(9, b"0"))
        if whole.startswith(b"-"):
            nanoseconds = -nanoseconds
    if abs(nanoseconds) > _MOST_SECONDS * _NS:
        raise ImageError("its mtime is out of every range")
    return nanoseconds


def _number(field: bytes, what: str, *, signed: bool = False) -> int:
    """Read octal digits, or GNU's binary form, which has the first bit set."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
        if value < 0 and not signed:
            raise ImageError(f"its {what} is negative")
        return value
    digits = field.strip(b" \0").partition(b"\0")[0]
    if not digits:
        return 0
    try:
        if digits.isdigit():  # int() alone would take signs and underscores
            return int(digits, 8)
    except ValueError:
        pass
    raise ImageError(f"its {what} {digits!r} is no octal number")


def _decimal(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ImageError(f"its {what} {text[:40]!r} is no number")
    return int(text)


def _payload(stream: "Stream", size: int, most: int) -> bytes:
    if size > most:
        raise ImageError(f"an extended header of the archive has {size} bytes, more than {most}")
    payload = stream.read(size)
    if len(payload) < size:
        raise ImageError("the archive ends in the middle of an extended header")
    stream.skip(_padded(size) - size)
    return payload


def _pax_records(payload: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
    """Split records of the form "LENGTH KEY=VALUE" and a newline, where LENGTH counts the whole record in bytes."""
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    at = 0
    while at < len(payload):
        space = payload.find(b" ", at, at + 10)
        digits = payload[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = payload[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(payload) or payload[end - 1 : end] != b"\n" or not equals or not key:
            raise ImageError("an extended header of the archive is broken")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pairs.append(value)
        records[key] = value
        at = end
    return records, pairs


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def shown(name: bytes) -> str:
    """Return `name` for a message: quoted, and cut to a length that fits a line."""
    import os

    text = os.fsdecode(name)
    return repr(text if len(text) <= 160 else f"{text[:80]}...{text[-60:]}")
