"""What an image is made of: the trimmed Debian, the apt sources, the view of the host."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import ImageError
from ringfence.image import trees
from ringfence.image.base import BASE, DEBIAN, Recipe, rewrite
from ringfence.image.host import host_digest, host_view
from ringfence.image.skeleton import MOUNT_POINTS
from ringfence.image.sources import host_suite, sources


def archive(*members: tuple[str, str, object], mode: int = 0o644) -> io.BytesIO:
    """A tar stream of (type, name, content or target) members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for kind, name, value in members:
            info = tarfile.TarInfo(name)
            info.mode, info.uid, info.gid, info.mtime = mode, 7, 8, 12345
            info.type = {
                "f": tarfile.REGTYPE,
                "d": tarfile.DIRTYPE,
                "l": tarfile.SYMTYPE,
                "h": tarfile.LNKTYPE,
            }.get(kind, kind.encode())
            content = value if isinstance(value, bytes) else b""
            info.size = len(content)
            info.linkname = value if isinstance(value, str) else ""
            tar.addfile(info, io.BytesIO(content))
    return io.BytesIO(out.getvalue())


class Entry(tarfile.TarInfo):
    """An entry that can have its content beside it: TarInfo has slots, a subclass has room."""

    content = b""


def rewritten(stream: io.BytesIO, recipe: Recipe, started_s: int = 50_000) -> dict[str, Entry]:
    """What `rewrite` makes of a stream: {path: entry}, each path once."""
    out = io.BytesIO()
    rewrite(stream, out, recipe, started_s=started_s)
    found = {}
    with tarfile.open(fileobj=io.BytesIO(out.getvalue()), tarinfo=Entry) as tar:
        for info in tar:
            assert isinstance(info, Entry)
            assert info.name not in found
            found[info.name] = info
            file = tar.extractfile(info) if info.isreg() else None
            info.content = file.read() if file else b""
    return found


def test_base_keeps_programs_and_leaves_out_what_is_the_build_hosts_own() -> None:
    """Sources, passwords, caches and documents go; programs stay; accounts and mount points are ours."""
    stream = archive(
        ("d", "./usr/bin", b""),
        ("f", "./usr/bin/python3", b"program"),
        ("d", "./etc/apt", b""),
        ("f", "./etc/apt/sources.list", b"deb http://user:secret@mirror"),
        ("d", "./usr/share/doc", b""),
        ("f", "./etc/shadow", b"root:secret"),
        ("f", "./etc/passwd", b"root:x:0:0"),
        ("f", "./etc/resolv.conf", b"nameserver 192.0.2.1"),
        ("d", "./tmp", b""),
        ("f", "./tmp/left", b"secret"),
        ("3", "./dev/null", b""),
        ("h", "./usr/bin/python", "./usr/bin/python3"),
    )
    made = rewritten(stream, BASE)
    assert made["usr/bin/python3"].content == b"program"
    assert made["usr/bin/python"].linkname == "usr/bin/python3"
    gone = {"etc/apt", "etc/apt/sources.list", "usr/share/doc", "etc/shadow", "dev/null", "tmp/left"}
    assert gone & made.keys() == set()
    assert b"sandbox:x:1000:1000::/work:/bin/sh" in made["etc/passwd"].content.splitlines()
    assert made["etc/resolv.conf"].content == b""
    assert all(made[name].isdir() for name in MOUNT_POINTS)


def test_base_has_no_set_uid_files_and_nothing_others_can_write() -> None:
    """Whatever modes and owners the packages bring, only root writes and no file changes who runs it."""
    made = rewritten(archive(("d", "./srv", b""), ("f", "./srv/su", b"x"), mode=0o7777), BASE)
    for name in ("srv", "srv/su"):
        assert (made[name].mode, made[name].uid, made[name].gid) == (0o755, 0, 0)


def test_a_debian_keeps_its_owners_and_modes_and_nothing_of_the_build_host() -> None:
    """/tmp stays writable for all, owners stay; apt's sources, host names and caches go, their directories stay."""
    made = rewritten(
        archive(
            ("d", "./tmp", b""),
            ("f", "./tmp/left", b"x"),
            ("f", "./etc/shadow", b"root:*"),
            ("f", "./etc/hostname", b"build-host"),
            ("d", "./etc/apt", b""),
            ("f", "./etc/apt/sources.list", b"deb http://user:secret@mirror"),
            ("d", "./var/lib/apt/lists", b""),
            ("f", "./var/lib/apt/lists/mirror", b"x"),
            mode=0o1777,
        ),
        DEBIAN,
    )
    assert {"tmp", "etc/shadow", "etc/apt", "var/lib/apt/lists"} <= made.keys()
    assert {"tmp/left", "etc/apt/sources.list", "var/lib/apt/lists/mirror"} & made.keys() == set()
    assert made["etc/hostname"].content == b""
    assert (made["tmp"].mode, made["tmp"].uid, made["tmp"].gid) == (0o1777, 7, 8)


@pytest.mark.parametrize(("started_s", "mtime"), [(12346, 12345), (12345, 0)])
def test_times_of_packages_stay_and_those_of_the_build_go(started_s: int, mtime: int) -> None:
    """What was there before the bootstrap began keeps its time; what it made has always the same one."""
    assert rewritten(archive(("f", "./a", b"")), BASE, started_s)["a"].mtime == mtime


@pytest.mark.parametrize(
    "stream",
    [
        io.BytesIO(b""),
        io.BytesIO(b"no tar at all" * 100),
        io.BytesIO(archive(("f", "a", b"x" * 5000)).getvalue()[:3000]),
        archive(("h", "a", "/etc/hostname")),
        archive(("Q", "a", b"")),
    ],
    ids=["empty", "garbage", "cut short", "link outside", "unknown type"],
)
def test_a_broken_stream_is_an_image_error(stream: io.BytesIO) -> None:
    """A stream that is no honest archive ends in one clear error."""
    with pytest.raises(ImageError):
        rewrite(stream, io.BytesIO(), BASE, started_s=0)


DEB822 = """# a comment
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb-src
URIs: http://mirror.example/debian
Suites: bookworm
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://vendor.example/
Suites: bookworm
Components: main
Signed-By: /etc/apt/keyrings/vendor.asc
"""
ONE_LINE = """
deb http://old.example/debian bookworm main contrib # a comment
deb [arch=amd64 signed-by=/etc/apt/keyrings/vendor.gpg] http://vendor.example/ bookworm stable
deb [trusted=yes] http://old.example/security bookworm-security main
#deb http://off.example/debian bookworm main
deb-src http://old.example/debian bookworm main
deb broken
"""
SIGNED = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    (tmp_path / "os-release").write_text('ID=debian\nVERSION_CODENAME="bookworm"\n')
    return tmp_path


def test_sources_are_the_hosts_debian_ones(etc: Path) -> None:
    """Both styles are read; other vendors, disabled lines, source packages and backports stay out."""
    (etc / "apt/sources.list").write_text(ONE_LINE)
    (etc / "apt/sources.list.d/debian.sources").write_text(DEB822)
    assert sources("bookworm", etc=str(etc)).splitlines() == [
        f"{SIGNED} http://old.example/debian bookworm main contrib",
        f"{SIGNED} http://old.example/security bookworm-security main",
        f"{SIGNED} http://mirror.example/debian bookworm main contrib",
        f"{SIGNED} http://mirror.example/debian bookworm-updates main contrib",
    ]


def test_another_suite_comes_from_the_same_places(etc: Path) -> None:
    """Trixie on a bookworm host is fetched from the host's mirror."""
    (etc / "apt/sources.list.d/debian.sources").write_text(DEB822)
    assert sources("trixie", etc=str(etc)).splitlines()[0] == (
        f"{SIGNED} http://mirror.example/debian trixie main contrib"
    )


def test_a_source_never_brings_options_into_the_list(etc: Path) -> None:
    """[trusted=yes] and the like do not survive, so every package is checked against Debian's keys."""
    (etc / "apt/sources.list").write_text(
        "deb [trusted=yes allow-insecure=yes] http://a.example/ bookworm main\n"
    )
    assert sources("bookworm", etc=str(etc)) == f"{SIGNED} http://a.example/ bookworm main\n"


def test_no_sources_is_an_empty_list_and_an_unknown_suite_an_error(etc: Path) -> None:
    """A host without Debian sources leaves the choice to mmdebstrap; a suite we do not know is refused."""
    assert sources("bookworm", etc=str(etc)) == ""
    with pytest.raises(ImageError, match="bookworm, trixie"):
        sources("sid", etc=str(etc))


@given(st.text(), st.text())
def test_any_text_of_apt_makes_whole_lines_or_none(
    tmp_path_factory: pytest.TempPathFactory, one_line: str, stanza: str
) -> None:
    """Whatever stands in apt's files, what comes out is whole lines signed by Debian, for the suite asked."""
    etc = tmp_path_factory.mktemp("etc")
    (etc / "apt/sources.list.d").mkdir(parents=True)
    (etc / "apt/sources.list").write_text(f"deb {one_line} bookworm main\n", errors="replace")
    (etc / "apt/sources.list.d/a.sources").write_text(
        f"Types: deb\nURIs: {stanza}\nSuites: bookworm", errors="replace"
    )
    for line in sources("bookworm", etc=str(etc)).splitlines():
        assert line.startswith(SIGNED + " ")
        assert line.isprintable()


@pytest.mark.parametrize(
    ("text", "suite"),
    [
        ("ID=debian\nVERSION_CODENAME=bookworm", "bookworm"),
        ('ID="debian"\nVERSION_CODENAME="trixie"', "trixie"),
        ("ID=ubuntu\nVERSION_CODENAME=bookworm", "trixie"),
        ("ID=debian\nVERSION_CODENAME=forky", "trixie"),
        ("", "trixie"),
    ],
)
def test_the_suite_is_the_hosts_or_the_newest(text: str, suite: str) -> None:
    """auto means the host's own suite where it is one we know, else the newest."""
    assert host_suite(text) == suite


@pytest.fixture
def fake_host(tmp_path: Path) -> Path:
    root = tmp_path / "host"
    for directory in (
        "usr/bin",
        "usr/share/zoneinfo",
        "etc/ssl/certs",
        "etc/ssl/private",
        "etc/alternatives",
        "home/me",
    ):
        (root / directory).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "lib").mkdir()
    (root / "etc/ld.so.cache").write_bytes(b"cache")
    (root / "etc/shadow").write_bytes(b"secret")
    (root / "home/me/key").write_bytes(b"secret")
    (root / "usr/share/zoneinfo/UTC").write_bytes(b"TZif")
    (root / "etc/localtime").symlink_to("../usr/share/zoneinfo/UTC")
    return root


def test_the_host_view_lists_programs_and_no_secrets(fake_host: Path) -> None:
    """Symlinks of a merged /usr are made anew, directories bound, a few files copied, nothing else shown."""
    view = host_view(str(fake_host))
    assert view.symlinks == (("/bin", "usr/bin"),)
    assert view.binds == ("/usr", "/etc/alternatives", "/etc/ssl/certs", "/lib")
    files = dict(view.files)
    assert files["/etc/ld.so.cache"] == b"cache"
    assert files["/etc/localtime"] == b"TZif"
    assert b"sandbox:x:1000" in files["/etc/passwd"]
    shown = " ".join((*view.binds, *files))
    assert not any(word in shown for word in ("shadow", "private", "home", "/root", "/var", "/run"))


@pytest.mark.parametrize("trap", ["unreadable", "outside", "fifo", "huge", "directory"])
def test_a_file_of_the_host_that_is_not_public_is_left_out(fake_host: Path, trap: str) -> None:
    """Not world-readable, leading out of /etc and /usr, a FIFO, huge, no file: left out, without waiting."""
    path = fake_host / "etc/services"
    if trap == "unreadable":
        path.write_bytes(b"secret")
        path.chmod(0o640)
    elif trap == "outside":
        path.symlink_to(fake_host / "home/me/key")
    elif trap == "fifo":
        os.mkfifo(path)
    elif trap == "huge":
        path.touch()
        os.truncate(path, 2 << 20)
    else:
        path.mkdir()
    assert "/etc/services" not in dict(host_view(str(fake_host)).files)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o750])
def test_a_directory_that_others_can_write_or_cannot_read_is_not_bound(fake_host: Path, mode: int) -> None:
    """Certificates from a directory anybody can write to would be worth nothing."""
    (fake_host / "etc/ssl/certs").chmod(mode)
    assert "/etc/ssl/certs" not in host_view(str(fake_host)).binds


def test_the_host_digest_changes_with_the_host(fake_host: Path) -> None:
    """The same host has the same digest; a changed file of the list or a changed /usr/bin has another."""
    digests = {host_digest(str(fake_host)), host_digest(str(fake_host))}
    assert len(digests) == 1
    (fake_host / "etc/ld.so.cache").write_bytes(b"another cache")
    digests.add(host_digest(str(fake_host)))
    (fake_host / "usr/bin/new").touch()
    os.utime(fake_host / "usr/bin", ns=(1, 1))
    digests.add(host_digest(str(fake_host)))
    assert len(digests) == 3


def test_removing_a_tree_follows_no_symlink(tmp_path: Path) -> None:
    """A symlink is removed, not what it leads to; the same for one inside a tree; a missing path is fine."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("tree", "link", "missing"):
        trees.remove_tree(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept/file").exists()


def test_mount_points_are_those_at_and_below_a_directory() -> None:
    """The kernel's table is read; a name that only begins alike is not below a directory."""
    assert "/proc" in trees.mount_points("/")
    assert "/proc" in trees.mount_points("/proc")
    assert "/proc" not in trees.mount_points("/pro")
