"""Layers unpacked into the store, against what GNU tar makes of the same archive and what overlayfs shows."""

import encodings
import fcntl
import gzip
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from archives import END, TAR, Store, digest, directory, file, hard_link, header, pax, symlink
from ringfence.errors import ImageError
from ringfence.image import layers
from ringfence.image.store import images_dir, layer_path

USER = 65534
CAPABILITY = bytes.fromhex("01000002" + "80" + "00" * 15)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """All that can be known of a tree, but the times of symlinks' targets and inode numbers."""
    found: dict[str, tuple[object, ...]] = {}
    first: dict[int, str] = {}
    for directory_path, names, files in os.walk(root):
        for name in (*names, *files):
            path = Path(directory_path, name)
            status = path.lstat()
            relative = str(path.relative_to(root))
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = digest(path.read_bytes())
            elif stat.S_ISLNK(status.st_mode):
                content = path.readlink()
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            owner = first.setdefault(status.st_ino, relative) if stat.S_ISREG(status.st_mode) else ""
            found[relative] = (
                oct(status.st_mode),
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                status.st_nlink if content is not None else 0,
                min(owner, relative) if status.st_nlink == 1 else status.st_nlink,
                content,
                attributes,
            )
    return found


@pytest.fixture(scope="module")
def root_fs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree with everything in it that an image may have."""
    root = tmp_path_factory.mktemp("tree") / "root"
    long = "/".join([f"directory-{number}-with-a-long-name" + "x" * 60 for number in range(5)])
    for name in ("etc", "usr/bin", "tmp", "var/lib/empty", long):
        (root / name).mkdir(parents=True)
    shutil.copytree(Path(encodings.__file__).parent, root / "encodings", symlinks=True)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (root / "etc/shadow").write_text("root:*:::::::\n")
    (root / "etc/shadow").chmod(0o640)
    os.chown(root / "etc/shadow", 0, 42)
    (root / long / ("file-with-a-long-name" + "y" * 200)).write_text("x")
    Path(os.fsdecode(os.fsencode(root) + b"/latin-\xe9\xff")).write_text("x")
    (root / "new\nline").write_text("x")
    (root / "empty").touch()
    os.link(root / "etc/passwd", root / "usr/bin/again")
    (root / "usr/bin/link").symlink_to("../../etc/passwd")
    os.link(root / "usr/bin/link", root / "usr/bin/link-again", follow_symlinks=False)
    (root / "usr/bin/nowhere").symlink_to("/no/where" + "z" * 150)
    os.mkfifo(root / "fifo", 0o620)
    for name, mode in (("tmp", 0o1777), ("var/lib/empty", 0o555), ("usr/bin", 0o2755)):
        (root / name).chmod(mode)
    os.chown(root / "var/lib/empty", 1000, 65535)
    with (root / "holes").open("wb") as holes:
        for at in (1 << 20, 5 << 20, 9 << 20):
            holes.seek(at)
            holes.write(b"data" * 3000)
        holes.truncate(12 << 20)
    with (root / "all-hole").open("wb") as holes:
        holes.truncate(3 << 20)
    os.setxattr(root / "etc/passwd", "user.note", b"\0binary\n=")
    os.setxattr(root / "etc", "user.note", b"x")
    os.utime(root / "etc/passwd", ns=(1, 1_234_567_890_123_456_789))
    os.utime(root / "etc", ns=(1, 1_000_000_000_000_000_000))
    os.utime(root / "usr/bin/nowhere", ns=(1, 86400 * 10**9), follow_symlinks=False)
    return root


PACKED = {
    "posix": ("zstd", ["--format=posix", "--xattrs", "--sparse"]),
    "posix sparse 0.0": ("gzip", ["--format=posix", "--xattrs", "--sparse", "--sparse-version=0.0"]),
    "posix sparse 0.1": ("gzip", ["--format=posix", "--xattrs", "--sparse", "--sparse-version=0.1"]),
    "gnu": ("", ["--format=gnu", "--sparse"]),
    "oldgnu": ("", ["--format=oldgnu", "--sparse"]),
}


@pytest.mark.requires("root")
@pytest.mark.parametrize(("compression", "options"), PACKED.values(), ids=PACKED)
def test_a_layer_is_as_the_archive_has_it(
    compression: str, options: list[str], root_fs: Path, store: Store, tmp_path: Path
) -> None:
    """Owners, modes, times, links, holes, attributes and names are those of the packed tree, in every format."""
    command = ["tar", "-c", *options, "-C", str(root_fs), "."]
    tar = subprocess.run(command, check=True, capture_output=True).stdout
    found = store.unpack(tar, compression=compression)
    reference = tmp_path / "reference"
    reference.mkdir()
    subprocess.run(
        ["tar", "-x", "-p", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", reference],
        input=tar,
        check=True,
    )
    assert tree(found) == tree(reference)
    assert found.stat().st_mode == reference.stat().st_mode
    assert (found / "holes").stat().st_blocks * 512 < 1 << 20
    assert (found / "holes").read_bytes() == (root_fs / "holes").read_bytes()
    assert len(tree(found)) > 120


@pytest.mark.requires("root")
def test_what_is_known_of_a_layer(store: Store) -> None:
    """layer.json counts; again costs no work; the directory lets nobody else in until it may be shared."""
    tar = file(b"a/b", b"12345") + symlink(b"s", b"a") + file(b"a/.wh.c") + END
    root = store.unpack(tar)
    assert layers.find(store.state, digest(tar)) == layers.Layer(
        diff_id=digest(tar), size_bytes=5, entries=4, owners=True, root_only=True
    )
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o700
    before = root.stat().st_ino
    (store.blobs / "blob").write_bytes(b"not read again")
    assert store.unpack(tar).stat().st_ino == before
    layers.share(store.state, digest(tar))
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o755
    assert store.content() == [root.parent.name]


@pytest.mark.requires("root")
@pytest.mark.parametrize(
    "part",
    [
        file(b"a", uid=1000),
        file(b"a", mode=0o666),
        file(b"a", mode=0o664, gid=5),
        directory(b"tmp", 0o1777),
        header(b"s", kind=b"2", link=b"x", uid=1000),
        pax([(b"SCHILY.xattr.security.capability", CAPABILITY)]) + file(b"a"),
    ],
    ids=["owner", "all may write", "a group may write", "tmp", "owner of a symlink", "capability"],
)
def test_only_roots_own_is_shared(part: bytes, store: Store) -> None:
    """A layer that another user of the host could change, or gain rights by, stays behind a closed directory."""
    tar = part + END
    root = store.unpack(tar)
    with pytest.raises(ImageError, match="cannot be shared"):
        layers.share(store.state, digest(tar))
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o700


@pytest.mark.requires("root")
def test_later_entries_take_the_place_of_earlier_ones(store: Store) -> None:
    """Of entries with one name the last counts, whatever kinds they are of; a directory keeps its files."""
    parts = [
        file(b"f", b"old") + file(b"f", b"new"),
        file(b"fd", b"x") + directory(b"fd") + file(b"fd/in", b"x"),
        directory(b"df/sub") + file(b"df/sub/in", b"x") + file(b"df", b"file"),
        directory(b"ds") + file(b"ds/in", b"x") + symlink(b"ds", b"/etc"),
        symlink(b"sd", b"/etc") + directory(b"sd", 0o700) + file(b"sd/in", b"x"),
        directory(b"dd", 0o755) + file(b"dd/in", b"x") + directory(b"dd", 0o711, uid=9, mtime=77),
        file(b"one", b"1") + hard_link(b"two", b"one") + file(b"two", b"2"),
        hard_link(b"f", b"f"),
        header(b"p", kind=b"6") + file(b"p", b"x"),
    ]
    root = store.unpack(b"".join(parts) + END)
    contents = {
        name: (root / name).read_bytes() for name in ("f", "fd/in", "df", "sd/in", "dd/in", "one", "two", "p")
    }
    assert contents == {
        "f": b"new",
        "fd/in": b"x",
        "df": b"file",
        "sd/in": b"x",
        "dd/in": b"x",
        "one": b"1",
        "two": b"2",
        "p": b"x",
    }
    assert (root / "ds").readlink() == Path("/etc")
    status = (root / "dd").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime) == (0o711, 9, 77)
    assert stat.S_IMODE((root / "sd").stat().st_mode) == 0o700


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "merged"
    place.mkdir()
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.requires("root")
def test_overlayfs_understands_whiteouts(store: Store, overlay: Path) -> None:
    """Mounted over the layer below, a layer hides what it removes, replaces what it has, and merges the rest."""
    names = [
        b"gone",
        b"both",
        b"late",
        b"gone-d/x",
        b"opaque/old",
        b"late-d/old",
        b"both-d/old",
        b"implied/old",
    ]
    lower = store.unpack(b"".join(file(name, b"old") for name in [*names, b"kept/old"]) + END)
    upper = store.unpack(
        b"".join(
            [
                file(b".wh.gone"),
                file(b"both", b"new") + file(b".wh.both"),
                file(b".wh.late") + file(b"late", b"new"),
                file(b".wh.gone-d"),
                directory(b"opaque") + file(b"opaque/new", b"new") + file(b"opaque/.wh..wh..opq"),
                file(b".wh.late-d") + directory(b"late-d") + file(b"late-d/new", b"new"),
                directory(b"both-d") + file(b"both-d/new", b"new") + file(b".wh.both-d"),
                file(b".wh.implied") + file(b"implied/new", b"new"),
                directory(b"kept") + file(b"kept/new", b"new"),
                file(b".wh.never-there"),
                file(b".wh..wh.aufs") + directory(b".wh..wh.plnk") + file(b".wh..wh.plnk/1.2", b"x"),
            ]
        )
        + END
    )
    command = ["mount", "-t", "overlay", "none", "-o", f"ro,lowerdir={upper}:{lower}", overlay]
    subprocess.run(command, check=True)
    found = {
        str(path.relative_to(overlay)): path.read_text() for path in overlay.rglob("*") if path.is_file()
    }
    assert found == {
        "both": "new",
        "late": "new",
        "opaque/new": "new",
        "late-d/new": "new",
        "both-d/new": "new",
        "implied/new": "new",
        "kept/old": "old",
        "kept/new": "new",
    }
    assert not (overlay / "gone-d").exists()


@pytest.mark.requires("root")
def test_the_same_layer_twice_is_the_same_tree(root_fs: Path, store: Store, tmp_path: Path) -> None:
    """Everything comes from the archive, directories that it only implies included: no time or owner is the host's."""
    tar = file(b"implied/by/file", b"x", mtime=5) + header(b"implied/fifo", kind=b"6") + END
    (tmp_path / "other").mkdir()
    first, second = store.unpack(tar), Store(tmp_path / "other").unpack(tar)
    assert tree(first) == tree(second)
    assert tree(first)["implied"][1:4] == (0, 0, 0)


_UNPACK = f"""
import os, sys
from ringfence.image import layers
from ringfence.errors import RingfenceError
if len(sys.argv) > 5:
    os.setgid(int(sys.argv[5])); os.setuid(int(sys.argv[5]))
try:
    layers.unpack(sys.argv[1], sys.argv[2], media_type="{TAR}" + sys.argv[6], digest=sys.argv[3], diff_id=sys.argv[4])
except RingfenceError as error:
    print(error)
else:
    with open("/proc/self/status") as status:  # ru_maxrss would count what ran before exec as well
        print("unpacked", next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def unpack_command(
    state: str, blob: Path, blob_digest: str, diff_id: str, *, kind: str = "+gzip"
) -> list[str]:
    return [
        sys.executable,
        "-c",
        _UNPACK.replace("sys.argv[6]", repr(kind)),
        state,
        str(blob),
        blob_digest,
        diff_id,
    ]


@pytest.fixture(scope="module")
def many_files() -> tuple[bytes, bytes]:
    """A tar of 6000 files, and the same compressed."""
    source = random.Random(1)
    content = [source.randbytes(200 + number % 3000) for number in range(100)]
    tar = (
        b"".join(file(b"d%d/f%d" % (number % 150, number), content[number % 100]) for number in range(6000))
        + END
    )
    return tar, gzip.compress(tar, 1)


def test_two_processes_do_the_work_once(many_files: tuple[bytes, bytes], store: Store) -> None:
    """Of several that want a layer at once one unpacks it, the others wait and find it."""
    tar, packed = many_files
    blob = store.blobs / "blob"
    blob.write_bytes(packed)
    command = unpack_command(store.state, blob, digest(packed), digest(tar))
    home = Path(images_dir(store.state, "layers"))
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    places: set[str] = set()
    while any(process.poll() is None for process in started):
        places |= {name for name in (os.listdir(home) if home.exists() else []) if name.startswith(".unpack")}
        time.sleep(0.005)
    assert [process.communicate()[0].split()[0] for process in started] == ["unpacked"] * 4
    assert len(places) == 1
    assert store.content() == [Path(layer_path(store.state, digest(tar))).name]


def test_killed_at_any_moment(many_files: tuple[bytes, bytes], store: Store) -> None:
    """kill -9 leaves either the whole layer or none; what is left of the work is unlocked, and the next unpacks."""
    tar, packed = many_files
    blob = store.blobs / "blob"
    blob.write_bytes(packed)
    command = unpack_command(store.state, blob, digest(packed), digest(tar))
    home = Path(images_dir(store.state, "layers"))
    killed = 0
    for delay_s in (0, 0.02, 0.05, 0.1, 0.2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not any(home.glob(".unpacking-*")):
            time.sleep(0.002)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        for rest in home.glob(".unpacking-*"):
            lock = os.open(rest, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(lock)
            shutil.rmtree(rest)
        layer = layers.find(store.state, digest(tar))
        if layer is not None:
            break
    assert killed
    root = store.unpack(tar, compression="gzip")
    assert sum(path.is_file() for path in root.rglob("*")) == 6000


def test_an_interrupted_unpacking_leaves_nothing(many_files: tuple[bytes, bytes], store: Store) -> None:
    """Ctrl-C half-way removes what was written, at once."""
    tar, packed = many_files
    blob = store.blobs / "blob"
    blob.write_bytes(packed)
    process = subprocess.Popen(
        unpack_command(store.state, blob, digest(packed), digest(tar)), stderr=subprocess.PIPE, text=True
    )
    home = Path(images_dir(store.state, "layers"))
    while process.poll() is None and not list(home.glob(".unpacking-*/fs/d1")):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].endswith("KeyboardInterrupt\n")
    assert store.content() == []


@pytest.mark.requires("root")
def test_a_full_or_read_only_disk(many_files: tuple[bytes, bytes], store: Store, tmp_path: Path) -> None:
    """Too few bytes or inodes, or no right to write: one line that says what to do, and nothing left."""
    tar, packed = many_files
    blob = tmp_path / "blob"
    blob.write_bytes(packed)
    arguments = (blob, digest(packed), digest(tar))
    for options, words in (
        ("size=4m", "No space left"),
        ("nr_inodes=300", "No space left"),
        ("ro", "Read-only"),
    ):
        place = tmp_path / options
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)
        try:
            said = subprocess.run(
                unpack_command(str(place), *arguments), capture_output=True, text=True, check=True
            )
            assert words in said.stdout
            assert "cannot " in said.stdout
            assert said.stdout.count("\n") == 1
            assert list(place.glob("images/layers/.*")) == []
        finally:
            subprocess.run(["umount", place], check=True)


@pytest.mark.requires("root")
def test_a_user_unpacks_for_himself(root_fs: Path, store: Store, tmp_path: Path) -> None:
    """Without root everything belongs to the user, whiteouts work in his own namespace, and he can remove it all."""
    tar = subprocess.run(["tar", "-c", "-C", str(root_fs), "."], check=True, capture_output=True).stdout
    extra = (
        directory(b"closed", 0o000) + file(b"closed/in", b"x") + file(b".wh.gone") + file(b"o/.wh..wh..opq")
    )
    tar = tar.rstrip(b"\0") + bytes(-len(tar.rstrip(b"\0")) % 512) + extra + END
    blob = store.blobs / "blob"
    blob.write_bytes(tar)
    for directory_path in (tmp_path, *tmp_path.parents[:2]):
        directory_path.chmod(directory_path.stat().st_mode | 0o011)
    os.chown(store.state, USER, USER)
    command = unpack_command(store.state, blob, digest(tar), digest(tar), kind="")
    environment = os.environ | {"HOME": "/nonexistent"}
    said = subprocess.run(
        [*command, str(USER)], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert said.startswith("unpacked"), said
    layer = layers.find(store.state, digest(tar))
    assert layer is not None
    assert not layer.owners
    root = Path(layer_path(store.state, digest(tar)), "fs")
    assert {path.lstat().st_uid for path in root.rglob("*")} == {USER}
    assert (root / "gone").lstat().st_rdev == 0
    assert stat.S_ISCHR((root / "gone").lstat().st_mode)
    assert os.getxattr(root / "o", "user.overlay.opaque") == b"y"
    assert (root / "closed/in").read_bytes() == b"x"
    subprocess.run(["rm", "-rf", root], check=True, user=USER, group=USER, extra_groups=[])


def test_memory_stays_flat(store: Store) -> None:
    """Half a gigabyte in one layer takes less than 64 MiB of memory, the interpreter included."""
    blob = store.blobs / "large"
    chunk = os.urandom(1 << 20)
    found = hashlib.sha256()
    with blob.open("wb") as target:
        for number in range(32):
            for part in (header(b"f%d" % number, size=16 << 20), *([chunk] * 16)):
                target.write(part)
                found.update(part)
        target.write(END)
        found.update(END)
    named = f"sha256:{found.hexdigest()}"
    command = unpack_command(store.state, blob, named, named, kind="")
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "unpacked"
    assert int(said[1]) < 64 << 10
