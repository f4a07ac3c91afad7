"""The reader of tar archives, held against Python's own and against what the manuals of tar say."""

import struct
import tarfile
from io import BytesIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from archives import (
    END,
    GNU,
    binary,
    directory,
    file,
    hard_link,
    header,
    long_name,
    octal,
    padded,
    pax,
    symlink,
)
from ringfence.errors import ImageError
from ringfence.image import limits
from ringfence.image.archive import clean
from ringfence.image.tarstream import DIRECTORY, FILE, Entry, entries, shown


class Bytes:
    """An archive in memory, read as a BlobStream is."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def read(self, size: int) -> bytes:
        taken = self.data[self.position : self.position + size]
        self.position += len(taken)
        return taken

    def skip(self, size: int) -> None:
        if len(self.read(size)) < size:
            raise ImageError("too short")


def read(archive: bytes, bounds: limits.Limits = limits.DEFAULT) -> list[tuple[Entry, bytes]]:
    """All entries, each with the bytes that are stored of it."""
    stream = Bytes(archive)
    return [(entry, stream.read(entry.stored)) for entry in entries(stream, bounds)]


def one(archive: bytes) -> Entry:
    ((entry, _),) = read(archive + END)
    return entry


names = st.text(
    st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), min_size=1, max_size=150
).filter(lambda name: name not in (".", ".."))
members = st.fixed_dictionaries(
    {
        "name": st.lists(names, min_size=1, max_size=3).map("/".join),
        "type": st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]),
        "linkname": st.lists(names, min_size=1, max_size=3).map("/".join),
        "content": st.binary(max_size=1200),
        "mode": st.integers(0, 0o7777),
        "uid": st.integers(0, 1 << 40),
        "gid": st.integers(0, 1 << 20),
        "mtime": st.integers(-(1 << 33), 1 << 40),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(members, max_size=4), st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_reads_what_tarfile_writes(given_members: list[dict[str, object]], kind: int) -> None:
    """Names, owners, modes, times, targets and content come back as they were written, in both formats."""
    target, wanted = BytesIO(), []
    with tarfile.open(fileobj=target, mode="w", format=kind) as archive:
        for fields in given_members:
            member = tarfile.TarInfo()
            for key in ("name", "type", "mode", "uid", "gid", "mtime"):
                setattr(member, key, fields[key])
            member.linkname = str(fields["linkname"]) if member.issym() else ""
            content = fields["content"] if member.isreg() else b""
            assert isinstance(content, bytes)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
            wanted.append((member, content))
    found = read(target.getvalue())
    assert len(found) == len(wanted)
    for (entry, stored), (member, content) in zip(found, wanted, strict=True):
        name = member.name.encode() + (b"/" if member.isdir() else b"")
        assert (entry.name.rstrip(b"/"), entry.kind) == (name.rstrip(b"/"), member.type)
        assert (entry.link, entry.mode) == (member.linkname.encode(), member.mode)
        assert (entry.uid, entry.gid, entry.mtime_ns) == (member.uid, member.gid, member.mtime * 10**9)
        assert (entry.size, stored) == (len(content), content)


_SOUND = [
    pax([(b"path", b"a" * 300), (b"mtime", b"1.5"), (b"SCHILY.xattr.user.a", b"b")]) + file(b"a", b"x" * 700),
    long_name(b"b" * 300) + file(b"b", b"y", magic=GNU),
    directory(b"d") + symlink(b"s", b"d") + hard_link(b"h", b"s"),
    pax([(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"4")])
    + file(b"s", padded(b"1\n0\n4\n") + b"data"),
    header(b"s", kind=b"S", size=4, magic=GNU, patches={386: octal(0, 12) + octal(4, 12), 483: octal(4, 12)})
    + padded(b"data"),
]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(_SOUND), min_size=1, max_size=3).map(b"".join),
    st.lists(st.tuples(st.integers(0, 6000), st.binary(min_size=1, max_size=12)), max_size=4),
    st.booleans(),
)
def test_damage_is_an_image_error(archive: bytes, damage: list[tuple[int, bytes]], mend: bool) -> None:
    """Whatever bytes change, with checksums mended or not, the reader ends, or refuses with an ImageError."""
    broken = bytearray(archive + END)
    for at, junk in damage:
        place = at % len(broken)
        broken[place : place + len(junk)] = junk
    if mend:
        for at in range(0, len(broken) - 511, 512):
            block = broken[at : at + 512]
            block[148:156] = b" " * 8
            if any(broken[at : at + 512]):
                broken[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    try:
        for entry, stored in read(bytes(broken)):
            assert len(stored) <= entry.stored
            assert entry.size >= 0
    except ImageError as error:
        assert "\n" not in str(error)


def test_pax_overrides_the_header() -> None:
    """Every field that an extended header may give wins over the entry's own, for that entry alone."""
    records = [
        (b"path", b"other"),
        (b"size", b"3"),
        (b"uid", b"7"),
        (b"gid", b"8"),
        (b"mtime", b"-1.25"),
        (b"comment", b"any"),
        (b"SCHILY.xattr.user.x", b"a=b\nc"),
    ]
    (first, stored), (second, _) = read(pax(records) + header(b"a") + padded(b"abc") + file(b"b") + END)
    assert (first.name, first.size, stored, first.uid, first.gid) == (b"other", 3, b"abc", 7, 8)
    assert (first.mtime_ns, first.xattrs) == (-750_000_000 - 10**9 + 500_000_000, {b"user.x": b"a=b\nc"})
    assert (second.name, second.uid, second.xattrs) == (b"b", 0, {})


def test_a_nul_in_a_name_is_refused_wherever_the_name_comes_from() -> None:
    """The map of a file with holes names its file too, and no file system takes a NUL."""
    sparse = [(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"1"), (b"GNU.sparse.name", b"a\0b")]
    for records in (sparse, [(b"path", b"a\0b")], [(b"linkpath", b"a\0b")]):
        with pytest.raises(ImageError, match="has a NUL byte"):
            one(pax(records) + file(b"x", b"y"))


def test_empty_pax_values_count_as_absent() -> None:
    """POSIX: a value of no bytes takes the record back."""
    entry = one(
        pax([(b"path", b""), (b"uid", b""), (b"size", b""), (b"mtime", b"")]) + file(b"a", b"x", uid=5)
    )
    assert (entry.name, entry.uid, entry.size) == (b"a", 5, 1)


def test_long_names_of_both_kinds() -> None:
    """GNU's long name wins over pax, as in Go's reader; both last for one entry."""
    both = pax([(b"path", b"p" * 200)]) + long_name(b"n" * 200) + file(b"a")
    assert one(both).name == b"n" * 200
    assert [entry.name for entry, _ in read(both + file(b"b") + END)] == [b"n" * 200, b"b"]


def test_prefixes() -> None:
    """The prefix of ustar counts, a shorter one in star's archives, and none in GNU's, which has times there."""
    patches = {345: b"p" * 140}
    assert one(header(b"a", patches=patches)).name == b"p" * 140 + b"/a"
    star = {345: b"p" * 140, 508: b"tar\0"}
    assert one(header(b"a", patches=star)).name == b"p" * 131 + b"/a"
    assert one(header(b"a", magic=GNU, patches={345: octal(1, 12)})).name == b"a"


def test_numbers() -> None:
    """Octal with any padding, and GNU's binary numbers."""
    assert one(header(b"a", mtime=b"  17 \0\0\0\0\0\0\0")).mtime_ns == 15 * 10**9
    assert one(header(b"a", mtime=b"\0" * 12)).mtime_ns == 0
    assert one(header(b"a", mtime=b"00000000017\0"[:12])).mtime_ns == 15 * 10**9
    assert one(header(b"a", mtime=binary(-5, 12))).mtime_ns == -5 * 10**9
    assert one(header(b"a", uid=binary(1 << 40, 8))).uid == 1 << 40


def test_kinds() -> None:
    """What has no content has none, whatever its size says; old archives mark directories with a slash."""
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
        found = read(header(b"a", kind=kind, size=512, link=b"l") + file(b"b", b"x") + END)
        assert [(entry.name, entry.stored) for entry, _ in found] == [(b"a", 0), (b"b", 1)]
    assert one(header(b"d/", kind=b"\0", magic=b"")).kind == DIRECTORY
    assert one(header(b"f", kind=b"\0", magic=b"")).kind == FILE
    assert one(header(b"f", kind=b"7")).kind == FILE
    assert [entry.name for entry, _ in read(file(b"g", b"x" * 600, kind=b"g") + file(b"a") + END)] == [b"a"]


def test_signed_checksums() -> None:
    """Some old writers added up signed bytes."""
    raw = bytearray(header("ä".encode()))
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(struct.unpack("512b", raw))
    assert one(bytes(raw)).name == "ä".encode()


def test_ends() -> None:
    """The archive ends at two zero blocks, or where the stream does; what follows is not its business."""
    assert read(b"") == []
    assert [entry.name for entry, _ in read(file(b"a"))] == [b"a"]
    assert [entry.name for entry, _ in read(file(b"a") + END + b"garbage" * 200)] == [b"a"]
    assert [entry.name for entry, _ in read(file(b"a") + bytes(512))] == [b"a"]


def test_what_is_not_read_is_passed_over() -> None:
    """The next entry comes also when nobody read the content of this one, or only some of it."""
    stream = Bytes(file(b"a", b"x" * 1000) + file(b"b", b"y" * 10) + file(b"c") + END)
    found = []
    for entry in entries(stream):
        found.append((entry.name, stream.read(7)[: entry.stored] if entry.name == b"b" else b""))
    assert found == [(b"a", b""), (b"b", b"y" * 7), (b"c", b"")]


@pytest.mark.parametrize(
    ("given_name", "path"),
    [(b"a", b"a"), (b"./a/b", b"a/b"), (b"/a//b/", b"a/b"), (b"./", b""), (b"/", b""), (b"a/./b", b"a/b")],
)
def test_clean(given_name: bytes, path: bytes) -> None:
    """Leading slashes and dots mean the image's root."""
    assert clean(given_name) == path


@given(st.lists(st.sampled_from([b"a", b"..", b".", b"", b"/", b"b" * 255, b"...", b"\xff"]), max_size=12))
def test_clean_never_leaves(parts: list[bytes]) -> None:
    """A cleaned path has neither empty parts nor dots, and ".." is always refused."""
    name = b"/".join(parts)
    try:
        path = clean(name)
    except ImageError:
        assert b".." in name.split(b"/") or not name
    else:
        assert b".." not in name.split(b"/")
        assert not {b"", b".", b".."} & set(path.split(b"/")) or path == b""


def test_shown_names_fit_a_line() -> None:
    """Long names are cut, and nothing in them can forge a line."""
    assert len(shown(b"x" * 4000)) < 160
    assert "\n" not in shown(b"a\nb")
