"""Hostile layers: whatever an archive says, nothing is written outside the store, and it ends in one clear line.

Each attack that aims outside is first tried on extractors that trust the archive, so that it is known to work.
"""

import gzip
import os
import resource
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import zstandard

from archives import (
    BLOCK,
    END,
    GNU,
    Store,
    binary,
    digest,
    directory,
    file,
    hard_link,
    header,
    long_name,
    octal,
    padded,
    pax,
    record,
    symlink,
)
from ringfence.errors import ImageError
from ringfence.image import layers, limits

# Pythons from before the filters have only the trusting way.
TRUSTED = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
SECRET = b"the host's own\n"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must not change: a directory with one file, beside the store and beside the naive extractor's root."""
    place = tmp_path / "outside"
    place.mkdir(mode=0o755)
    (place / "secret").write_bytes(SECRET)
    return place


def look(outside: Path) -> list[tuple[object, ...]]:
    """All that an archive could change outside."""
    found = [outside, *sorted(outside.rglob("*"))]
    return [
        (path, status.st_mode, status.st_uid, status.st_nlink, path.read_bytes() if path.is_file() else b"")
        for path, status in ((path, path.lstat()) for path in found)
    ]


def with_gnu_tar(archives: list[bytes], root: Path) -> None:
    for archive in archives:
        command = ["tar", "-x", "-p", "-P", "-f", "-"]
        subprocess.run(command, cwd=root, input=archive, capture_output=True, check=False)


def with_tarfile(archives: list[bytes], root: Path) -> None:
    for archive in archives:
        with tarfile.open(fileobj=BytesIO(archive)) as opened:
            for member in opened:
                member.name = member.name.rstrip("/")
            try:
                opened.extractall(root, **TRUSTED)
            except (OSError, KeyError):
                continue


def _escapes(outside: str) -> dict[str, tuple[list[bytes], str | None]]:
    """Archives by name, and the words of the refusal; None: it is unpacked, and stays inside."""
    there = os.fsencode(outside)
    beside = b"../outside"
    return {
        "absolute path": ([file(there + b"/pwned", b"x")], None),
        "dot dot": ([file(beside + b"/pwned", b"x")], "leaves the image"),
        "dot dot inside": ([directory(b"a"), file(b"a/../../outside/pwned", b"x")], "leaves the image"),
        "dot dot in a long name": ([long_name(b"./" * 60 + beside + b"/pwned") + file(b"a", b"x")], "leaves"),
        "dot dot in pax": ([pax([(b"path", beside + b"/pwned")]) + file(b"a", b"x")], "leaves the image"),
        "dot dot in the prefix": ([file(b"outside/pwned", b"x", patches={345: b".."})], "leaves the image"),
        "absolute symlink": ([symlink(b"s", there), file(b"s/pwned", b"x")], "through the symlink 's'"),
        "relative symlink": ([symlink(b"s", beside), file(b"s/pwned", b"x")], "through the symlink 's'"),
        "two symlinks": (
            [symlink(b"s", b".."), symlink(b"t", b"s/outside"), file(b"t/pwned", b"x")],
            "through the symlink 't'",
        ),
        "directory through a symlink": ([symlink(b"s", there), directory(b"s/pwned")], "through the symlink"),
        "symlink through a symlink": (
            [symlink(b"s", there), symlink(b"s/pwned", b"/etc")],
            "through the sym",
        ),
        "fifo through a symlink": (
            [symlink(b"s", there), header(b"s/pwned", kind=b"6")],
            "through the symlink",
        ),
        "directory over a symlink": ([symlink(b"s", there), directory(b"s"), file(b"s/pwned", b"x")], None),
        "file over a symlink": ([symlink(b"s", there + b"/secret"), file(b"s", b"x")], None),
        "hard link over a symlink": (
            [file(b"f", b"x"), symlink(b"s", there + b"/secret"), hard_link(b"s", b"f"), file(b"s", b"y")],
            None,
        ),
        "directory's owner through a symlink": ([symlink(b"s", there), directory(b"s", 0o777, uid=7)], None),
        "absolute hard link": ([hard_link(b"h", there + b"/secret")], "which the layer does not have"),
        "relative hard link": ([hard_link(b"h", beside + b"/secret")], "which the layer does not have"),
        "write through a hard link": (
            [hard_link(b"h", there + b"/secret"), file(b"h", b"x")],
            "which the layer does not have",
        ),
        "hard link through a symlink": (
            [symlink(b"s", there), hard_link(b"h", b"s/secret")],
            "which the layer does not have",
        ),
    }


@pytest.mark.parametrize("attack", sorted(_escapes("/x")))
def test_nothing_leads_outside(attack: str, store: Store, outside: Path, tmp_path: Path) -> None:
    """What fools an extractor that trusts the archive changes nothing outside the store."""
    parts, refusal = _escapes(str(outside))[attack]
    archive = b"".join(parts) + END
    before = look(outside)
    if refusal is None:
        root = store.unpack(archive)
        assert root.is_dir()
        if (made := list(root.rglob("pwned"))) or attack == "absolute path":
            assert [path.read_bytes() for path in made] == [b"x"]
    else:
        with pytest.raises(ImageError, match=refusal) as refused:
            store.unpack(archive)
        assert "\n" not in str(refused.value)
        assert store.content() == []
    assert look(outside) == before
    assert _fooled(lambda extract, root: extract([archive], root), outside, tmp_path), (
        "no attack: nothing to prove"
    )


def _fooled(
    attack: Callable[[Callable[[list[bytes], Path], None], Path], None], outside: Path, tmp_path: Path
) -> bool:
    """Say whether at least one naive extractor changes something outside; outside is as before afterwards."""
    fooled = False
    for extract in (with_gnu_tar, with_tarfile):
        before = look(outside)
        root = tmp_path / extract.__name__
        root.mkdir()
        attack(extract, root)
        if look(outside) != before:
            fooled = True
            for path in outside.iterdir():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            outside.chmod(0o755)
            os.chown(outside, 0, 0)
            (outside / "secret").write_bytes(SECRET)
    return fooled


def test_attributes_for_later_do_not_follow(store: Store, outside: Path) -> None:
    """A directory whose place a symlink takes does not pass its owner and mode on to the symlink's target."""
    before = look(outside)
    made = [directory(b"d", 0o777, uid=1000), file(b"d/e/f", b"x"), symlink(b"d", os.fsencode(outside))]
    root = store.unpack(b"".join(made) + END)
    assert (root / "d").readlink() == outside
    assert look(outside) == before
    with pytest.raises(ImageError, match="through the symlink 'd'"):
        store.unpack(b"".join([*made, file(b"d/pwned", b"x")]) + END)
    assert look(outside) == before


@pytest.mark.requires("root")
def test_a_symlink_swapped_for_a_directory_between_layers(
    store: Store, outside: Path, tmp_path: Path
) -> None:
    """A layer that writes below a symlink of the layer under it writes into its own directory."""
    lower = symlink(b"etc", os.fsencode(outside)) + END
    upper = file(b"etc/pwned", b"x") + END
    before = look(outside)
    assert store.unpack(lower).joinpath("etc").is_symlink()
    assert store.unpack(upper).joinpath("etc/pwned").read_bytes() == b"x"
    assert look(outside) == before
    assert _fooled(lambda extract, root: extract([lower, upper], root), outside, tmp_path)


@pytest.mark.requires("root")
def test_no_set_uid_shell_in_the_store(store: Store, tmp_path: Path) -> None:
    """Set-uid and set-gid bits of files are gone, also through a hard link; naive extraction keeps them."""
    archive = file(b"sh", b"#!", mode=0o6755) + hard_link(b"sh2", b"sh") + directory(b"d", 0o2755) + END
    root = store.unpack(archive)
    assert [stat.S_IMODE((root / name).stat().st_mode) for name in ("sh", "sh2", "d")] == [
        0o755,
        0o755,
        0o2755,
    ]
    with_gnu_tar([archive], tmp_path)
    assert (tmp_path / "sh").stat().st_mode & 0o6000 == 0o6000


@pytest.mark.requires("root")
@pytest.mark.parametrize("kind", [b"3", b"4"])
def test_no_device_nodes(kind: bytes, store: Store, tmp_path: Path) -> None:
    """A device is refused, left out of /dev, and cannot pass for a whiteout; naive extraction makes it."""
    null = {329: octal(1, 8), 337: octal(3, 8)}
    archive = header(b"etc/null", kind=kind, patches=null) + END
    with pytest.raises(ImageError, match="'etc/null': it is a device node"):
        store.unpack(archive)
    with pytest.raises(ImageError, match="device node"):
        store.unpack(
            header(b"forged-whiteout", kind=kind, patches={329: octal(0, 8), 337: octal(0, 8)}) + END
        )
    assert store.content() == []
    inside = store.unpack(directory(b"dev") + header(b"dev/null", kind=kind, patches=null) + END)
    assert list((inside / "dev").iterdir()) == []
    with_gnu_tar([archive], tmp_path)
    assert not stat.S_ISREG((tmp_path / "etc/null").stat().st_mode)


@pytest.mark.requires("root")
def test_attributes_that_overlayfs_reads_stay_out(store: Store) -> None:
    """An archive cannot tell overlayfs to look elsewhere, nor set labels; its own notes and rights are kept."""
    capability = bytes.fromhex("0100000280000000000000000000000000000000")
    given = {
        b"trusted.overlay.redirect": b"/etc",
        b"trusted.overlay.opaque": b"y",
        b"user.overlay.redirect": b"/etc",
        b"security.selinux": b"label",
        b"security.capability": capability,
        b"system.posix_acl_access": b"\2\0\0\0",
        b"user.note": b"kept",
    }
    attributes = pax([(b"SCHILY.xattr." + key, value) for key, value in given.items()])
    root = store.unpack(attributes + file(b"f") + attributes + directory(b"d") + END)
    assert sorted(os.listxattr(root / "f")) == ["security.capability", "user.note"]
    assert os.listxattr(root / "d") == ["user.note"]


def _whiteouts() -> dict[str, tuple[bytes, str]]:
    return {
        "of the directory itself": (file(b"d/.wh.."), "whiteout of nothing"),
        "of the parent": (file(b"d/.wh..."), "whiteout of nothing"),
        "of no name": (file(b"d/.wh."), "whiteout of nothing"),
        "with a slash": (file(b".wh.d/../../x"), "leaves the image"),
        "with a file in it": (file(b".wh.d/x"), "lies in a whiteout"),
        "through a symlink": (symlink(b"s", b"/etc") + file(b"s/.wh.passwd"), "through the symlink 's'"),
        "opaque through a symlink": (symlink(b"s", b"/etc") + file(b"s/.wh..wh..opq"), "through the symlink"),
        "of the whole root": (file(b".wh..wh..opq"), "not supported"),
        "as the target of a hard link": (file(b".wh.x") + hard_link(b"y", b"x"), "which is no file"),
    }


_HUGE = 1 << 40


def _broken() -> dict[str, tuple[bytes, str]]:
    """Archives that no rule of the format allows, or that ask for too much, and the words of the refusal."""
    some = file(b"a", b"x")
    map_1_0 = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")]
    map_0_1 = [(b"GNU.sparse.size", b"9"), (b"GNU.sparse.numblocks", b"1")]
    more = bytes(21 * 24) + b"\1" + bytes(7)
    old_sparse = {"kind": b"S", "magic": GNU}
    return {
        "huge pax header": (header(b"x", kind=b"x", size=_HUGE) + some, "more than 1048576"),
        "huge long name": (header(b"x", kind=b"L", size=_HUGE, magic=GNU) + some, "more than 1048576"),
        "huge long link": (header(b"x", kind=b"K", size=_HUGE, magic=GNU) + some, "more than 1048576"),
        "huge global header": (header(b"x", kind=b"g", size=_HUGE) + some, "in the middle of"),
        "negative size": (header(b"a", size=binary(-512, 12)) + some, "size is negative"),
        "negative size in pax": (pax([(b"size", b"-512")]) + some, "size b'-512' is no number"),
        "negative pax header": (header(b"x", kind=b"x", size=binary(-512, 12)) + some, "size is negative"),
        "size with a sign": (header(b"a", size=b"+0000000777\0"), "no octal number"),
        "size with an underscore": (header(b"a", size=b"0000000_777\0"), "no octal number"),
        "size past the end": (header(b"a", size=4096) + padded(b"x"), "in the middle of it"),
        "size past every limit": (header(b"a", size=binary(1 << 70, 12)), "files of the layer pass"),
        "size too small": (header(b"a", size=1) + padded(b"x" * 600) + some, "wrong checksum"),
        "pax size past the end": (pax([(b"size", b"99999")]) + some, "in the middle of it"),
        "cut header": (some + header(b"b")[:300], "in the middle of a header"),
        "cut pax header": (pax([(b"path", b"x" * 900)])[:700], "in the middle of an extended header"),
        "pax header without entry": (pax([(b"path", b"x")]), "ends after an extended header"),
        "garbage": (b"\xde\xad" * 4096, "checksum"),
        "wrong checksum": (header(b"a", checksum=1), "wrong checksum"),
        "one zero block": (bytes(BLOCK) + some, "goes on after a block"),
        "broken pax length": (
            file(b"p", b"99 path=x\n", kind=b"x") + some,
            "extended header of the archive is",
        ),
        "pax length 0": (file(b"p", b"0 path=x\n", kind=b"x") + some, "extended header of the archive is"),
        "pax length that overlaps": (file(b"p", b"3 a=b\n", kind=b"x") + some, "extended header of the"),
        "pax of digits alone": (file(b"p", b"1" * (1 << 20), kind=b"x") + some, "extended header of the"),
        "NUL in a name": (pax([(b"path", b"a\0b")]) + some, "has a NUL byte"),
        "NUL in a link": (pax([(b"linkpath", b"a\0b")]) + symlink(b"s", b"x"), "has a NUL byte"),
        "no name": (file(b"", b"x"), "empty"),
        "root as a file": (file(b"./", b"x"), "the root must be a directory"),
        "root as a symlink": (symlink(b".", b"/"), "the root must be a directory"),
        "long path": (long_name(b"/".join([b"d" * 100] * 60)) + some, "longer than"),
        "long name": (long_name(b"d" * 256) + some, "longer than"),
        "deep path": (long_name(b"d/" * 300 + b"f") + some, "deep"),
        "long symlink": (pax([(b"linkpath", b"x" * 5000)]) + symlink(b"s", b""), "symlink to nowhere"),
        "empty symlink": (symlink(b"s", b""), "symlink to nowhere"),
        "hard link to a directory": (directory(b"d") + hard_link(b"h", b"d"), "which is no file"),
        "hard link to the root": (hard_link(b"h", b"."), "which is no file"),
        "hard link to nothing": (hard_link(b"h", b"missing"), "does not have"),
        "hard link to itself": (hard_link(b"h", b"h"), "does not have"),
        "hard link over its target's directory": (
            file(b"d/e/f", b"x") + hard_link(b"d", b"d/e/f"),
            "replaces",
        ),
        "file as a directory": (file(b"f", b"x") + file(b"f/g", b"x"), "through the file 'f'"),
        "unknown type": (header(b"a", kind=b"Z"), "unknown type"),
        "volume label": (header(b"a", kind=b"V", magic=GNU), "unknown type"),
        "multi-volume": (header(b"a", kind=b"M", magic=GNU), "unknown type"),
        "owner too high": (file(b"a", uid=65536), "none of the 65536 ids"),
        "owner far too high": (pax([(b"uid", b"4294967296")]) + some, "none of the 65536 ids"),
        "directory's owner too high": (directory(b"d", gid=65536), "none of the 65536 ids"),
        "negative owner": (file(b"a", uid=binary(-1, 8)), "uid is negative"),
        "owner that is no number": (pax([(b"gid", b"staff")]) + some, "is no number"),
        "time out of range": (pax([(b"mtime", b"9" * 19)]) + some, "out of every range"),
        "time that is none": (pax([(b"mtime", b"1e9")]) + some, "is no time"),
        "attribute too large": (
            pax([(b"SCHILY.xattr.user.a", b"x" * 70000)]) + some,
            "cannot set its attrib",
        ),
        "attribute's long name": (pax([(b"SCHILY.xattr.user." + b"a" * 300, b"x")]) + some, "cannot set its"),
        "sparse map with an absurd count": (
            pax(map_1_0) + file(b"s", b"9" * 18 + b"\n"),
            "cut off or too long",
        ),
        "sparse map of a billion": (
            pax(map_1_0) + file(b"s", b"1000000000\n" + b"0\n" * 2000),
            "cut off or too long",
        ),
        "sparse map without newlines": (pax(map_1_0) + file(b"s", b"1" * 4096), "cut off or too long"),
        "sparse map that overlaps": (
            pax([*map_0_1, (b"GNU.sparse.map", b"4,4,0,4")]) + file(b"s", b"x" * 8),
            "out",
        ),
        "sparse map past the end": (
            pax([*map_0_1, (b"GNU.sparse.map", b"8,8")]) + file(b"s", b"x" * 8),
            "leaves",
        ),
        "sparse map of too little": (
            pax([*map_0_1, (b"GNU.sparse.map", b"0,4")]) + file(b"s", b"x" * 8),
            "places",
        ),
        "sparse map of one number": (
            pax([*map_0_1, (b"GNU.sparse.map", b"0")]) + file(b"s", b""),
            "is broken",
        ),
        "sparse map of words": (pax([*map_0_1, (b"GNU.sparse.map", b"a,b")]) + file(b"s", b""), "is broken"),
        "endless old sparse map": (
            header(b"s", **old_sparse, patches={482: b"\1"}) + more * 4000,  # type: ignore[arg-type]
            "cut off or too long",
        ),
        "sparse file past every limit": (
            header(b"s", **old_sparse, patches={483: binary(1 << 62, 12)}),  # type: ignore[arg-type]
            "files of the layer pass",
        ),
        "negative old sparse offset": (
            header(b"s", **old_sparse, patches={386: binary(-1, 12)}),  # type: ignore[arg-type]
            "offset is negative",
        ),
    }


@pytest.mark.parametrize(("attack", "case"), [*_whiteouts().items(), *_broken().items()])
def test_one_clear_line(attack: str, case: tuple[bytes, str], store: Store) -> None:
    """A broken or greedy archive ends in one line that says what is wrong with it, at once, and leaves nothing."""
    archive, refusal = case
    started = time.monotonic()
    with pytest.raises(ImageError, match=refusal) as refused:
        store.unpack(archive if attack.startswith("cut ") else archive + END)
    assert time.monotonic() - started < 2
    line = str(refused.value)
    assert line.startswith("cannot unpack layer sha256:")
    assert "\n" not in line
    assert len(line) < 600
    assert store.content() == []


def _damaged() -> dict[str, tuple[str, bytes, str]]:
    tar = file(b"a", b"x" * 5000) + END
    packed, frame = gzip.compress(tar), zstandard.compress(tar)
    return {
        "cut gzip": ("gzip", packed[:-20], "ends too early"),
        "cut gzip trailer": ("gzip", packed[:-3], "ends too early"),
        "empty blob": ("gzip", b"", "ends too early"),
        "damaged gzip": ("gzip", packed[:30] + b"\xff\xff\xff" + packed[33:], "gzip stream"),
        "garbage after gzip": ("gzip", packed + b"garbage", "no sound gzip"),
        "tar that says gzip": ("gzip", tar, "no sound gzip"),
        "zstd that says gzip": ("gzip", frame, "no sound gzip"),
        "gzip that says tar": ("", packed, "checksum|octal|middle"),
        "cut zstd": ("zstd", frame[:-8], "in the middle|uncompressed layer has|zstd"),
        "garbage after zstd": ("zstd", frame + b"garbage!", "no sound zstd"),
        "gzip that says zstd": ("zstd", packed, "no sound zstd"),
    }


@pytest.mark.parametrize(("attack", "case"), _damaged().items())
def test_damaged_blobs(attack: str, case: tuple[str, bytes, str], store: Store) -> None:
    """A blob that is cut off, damaged or of another format than it says is refused, even with its right digest."""
    compression, blob, refusal = case
    with pytest.raises(ImageError, match=refusal) as refused:
        store.unpack(file(b"a", b"x" * 5000) + END, compression=compression, blob=blob)
    assert "\n" not in str(refused.value)
    assert store.content() == []


def test_digests_are_checked(store: Store, tmp_path: Path) -> None:
    """A layer whose blob or content has another digest than promised is not kept, though it unpacks well."""
    tar = file(b"a", b"x") + END
    with pytest.raises(ImageError, match=r"its blob has the digest sha256:.*not sha256:"):
        store.unpack(tar, compression="gzip", blob_digest=digest(b"other"))
    with pytest.raises(ImageError, match="its uncompressed layer has the digest"):
        store.unpack(tar, compression="gzip", diff_id=digest(b"other"))
    assert store.content() == []
    for wrong in ("sha256:../../../etc", "md5:" + "0" * 64, "sha256:" + "0" * 63 + "G", ""):
        with pytest.raises(ImageError, match="digest"):
            layers.unpack(store.state, "x", media_type="x", digest=wrong, diff_id=wrong)
    with pytest.raises(ImageError, match="unknown media type 'text/html'"):
        layers.unpack(store.state, "x", media_type="text/html", digest=digest(tar), diff_id=digest(tar))
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("fifo", "link", "missing"):
        with pytest.raises(ImageError, match=r"no regular file|symbolic links|No such file"):
            layers.unpack(
                store.state,
                str(tmp_path / name),
                media_type="application/vnd.oci.image.layer.v1.tar",
                digest=digest(tar),
                diff_id=digest(tar),
            )
    assert store.content() == []


SMALL = limits.Limits(ratio_from_bytes=8 << 20, ratio=50, entries=500)


def _zeros(size: int) -> bytes:
    return header(b"zeros", size=size)


def _zero_members(head: bytes, size: int) -> bytes:
    """A gzip stream of `head` and then zeros, without holding them: one member again and again."""
    step = 32 << 20
    return gzip.compress(head) + gzip.compress(bytes(step)) * (size // step)


def _wide_window() -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(file(b"a")) + packer.flush()


BOMBS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "zeros in one file": (
        "gzip",
        lambda: _zero_members(header(b"zeros", size=1 << 30), 64 << 20),
        "files of the layer pass",
    ),
    "zeros behind the end": (
        "gzip",
        lambda: _zero_members(END, 64 << 20),
        "unpacks to more than 8388608 bytes",
    ),
    "zeros of zstd": (
        "zstd",
        lambda: zstandard.compress(END + bytes(64 << 20)),
        "unpacks to more than 8388608 bytes",
    ),
    "zstd window of 256 MiB": ("zstd", _wide_window, "no sound zstd stream"),
    "empty gzip members": ("gzip", lambda: gzip.compress(b"") * 600, "more than 500 gzip members"),
    "entries": (
        "gzip",
        lambda: gzip.compress(b"".join(file(b"%d" % number) for number in range(501))),
        "more than 500 entries",
    ),
    "the same entry": ("gzip", lambda: gzip.compress(file(b"e") * 501), "more than 500 entries"),
    "directories between": (
        "gzip",
        lambda: gzip.compress(b"".join(file(b"%d" % number + b"/d" * 40) for number in range(15))),
        "more than 500 files and directories",
    ),
    "sparse file": (
        "",
        lambda: header(b"s", kind=b"S", magic=GNU, patches={483: binary(1 << 40, 12)}),
        "files of the layer pass",
    ),
    "extended headers": (
        "gzip",
        lambda: gzip.compress(pax([(b"path", b"x" * 400)]) * 9000),
        "unpacks to more than 8388608 bytes",
    ),
}


@pytest.mark.parametrize("attack", BOMBS)
def test_bombs(attack: str, store: Store) -> None:
    """What grows without measure is stopped at the limit, in bounded time."""
    compression, build, refusal = BOMBS[attack]
    blob = build()
    started = time.monotonic()
    with pytest.raises(ImageError, match=refusal) as refused:
        store.unpack(b"", compression=compression, blob=blob, bounds=SMALL)
    assert time.monotonic() - started < 10
    assert "\n" not in str(refused.value)
    assert store.content() == []


_CHILD = """
import sys
from ringfence.errors import ImageError
from ringfence.image import layers
try:
    layers.unpack(sys.argv[1], sys.argv[2], media_type=sys.argv[3], digest=sys.argv[4], diff_id=sys.argv[4])
except ImageError as error:
    with open("/proc/self/status") as status:
        print(next(line.split()[1] for line in status if line.startswith("VmHWM")), error)
"""


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_takes_no_memory(kind: str, store: Store, tmp_path: Path) -> None:
    """A bomb of 1.5 GiB is stopped at the default limit of 1 GiB, in less than 64 MiB of memory in all."""
    size = 3 << 29
    if kind == "gzip":
        blob = _zero_members(END, size)
    else:
        packer = zstandard.ZstdCompressor().compressobj()
        blob = b"".join([packer.compress(END), *(packer.compress(bytes(1 << 20)) for _ in range(size >> 20))])
        blob += packer.flush()
    path = tmp_path / "bomb"
    path.write_bytes(blob)
    media_type = f"application/vnd.oci.image.layer.v1.tar+{kind}"
    command = [sys.executable, "-c", _CHILD, store.state, str(path), media_type, digest(blob)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    most_kib, _, line = said.partition(" ")
    assert "unpacks to more than 1073741824 bytes" in line
    assert int(most_kib) < 64 << 10
    assert len(blob) * 400 < size, "no bomb"


def test_many_directories_take_no_descriptors(store: Store) -> None:
    """An archive with more directories than a process may have open files is unpacked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        tar = b"".join(file(b"d%d/f" % number, b"x") for number in range(1000)) + END
        assert len(list(store.unpack(tar).glob("*/f"))) == 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_names_that_only_look_hostile(store: Store) -> None:
    """Newlines, bytes that are no UTF-8, leading dashes and many dots are names like others."""
    names = [
        b"new\nline",
        b"\xff\xfe",
        b"-rf",
        b"...",
        b".wh",
        b"a b",
        b"\x1b[31m",
        "ü".encode(),
        b"wh..wh..opq",
    ]
    root = store.unpack(b"".join(file(name, name) for name in names) + END)
    found = {name: Path(os.fsdecode(os.path.join(os.fsencode(root), name))).read_bytes() for name in names}
    assert found == {name: name for name in names}
    with pytest.raises(ImageError) as refused:
        store.unpack(file(b"\x1b[31m\n../x/..", b"") + END)
    assert "\x1b" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert record(b"a", b"b") == b"6 a=b\n"
