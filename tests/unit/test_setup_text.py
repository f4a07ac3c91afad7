"""The guest's parser of the setup text (agent/setup.c): everything it takes is exact, everything else names its key."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from needs import COMPILERS

HERE = Path(__file__).parent
AGENT = HERE.parents[1] / "agent"
BASE = {
    "hostname": "sandbox-1",
    "uid": "1000",
    "gid": "1001",
    "caps": "0",
    "nnp": "1",
    "seccomp": "060000000000ff7f",
    "memory": "67108864",
    "swap": "0",
    "pids": "51",
    "root": "vda:erofs",
    "overlay": "ro",
    "shm": "1048576:100",
    "sysfs": "0",
}
Parse = Callable[[bytes], list[str]]


@pytest.fixture(scope="session")
def parse(tmp_path_factory: pytest.TempPathFactory) -> Parse:
    """Give a function from setup text to what the parser made of it."""
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs compiler: no C compiler")
    program = tmp_path_factory.mktemp("setup") / "setup-text"
    command = [compiler, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{AGENT}", "-o", str(program)]
    subprocess.run([*command, str(HERE / "setup_text.c"), str(AGENT / "setup.c")], check=True)

    def run(text: bytes) -> list[str]:
        done = subprocess.run([program], input=text, capture_output=True, check=True, timeout=30)
        return done.stdout.decode("latin-1").splitlines()

    return run


def text(*more: str, **changed: str | None) -> bytes:
    """The text of BASE, with keys changed or (None) left out, and lines added."""
    lines = [f"{key}={value}" for key, value in {**BASE, **changed}.items() if value is not None]
    return b"".join(line.encode() + b"\0" for line in [*lines, *more])


def test_everything_is_read(parse: Parse) -> None:
    """Each key comes out as it went in, steps in their order."""
    found = parse(
        text(
            "rlimit=7:64:128",
            "rlimit=0:18446744073709551615:18446744073709551615",
            "sysctl=kernel.sem=1 2:3=4",
            "dir=/a/b:755:1:2",
            "file=/etc/x:644:a:b=c\n",
            "link=/bin:usr/bin",
            "tmpfs=/tmp:4096:7:1777:0:0",
            "scratch=8192:9",
            "share=/data:1000:1001",
            "disk=vdb:erofs:/in:ro",
            "disk=vdc:erofs:/out:rw:65536:11",
            "mask=/proc/kcore",
            "readonly=/proc/sys",
            caps="80000001ff",
            seccomp="060000000000ff7f" * 2,
            memory="max",
            overlay="1073741824:1000",
            sysfs="1",
        )
    )
    assert found == [
        "hostname sandbox-1",
        "ids 1000 1001",
        "caps 80000001ff",
        "limits 18446744073709551615 0 51",
        "filter 2 7fff000000000006 7fff000000000006",
        "sysfs 1",
        "root vda erofs",
        "upper 1073741824 1000",
        "shm 1048576 100",
        "rlimit 0 18446744073709551615 18446744073709551615",
        "rlimit 7 64 128",
        "step 0 kernel.sem mode=0 uid=0 gid=0 text=1 2:3=4",
        "step 1 /a/b mode=755 uid=1 gid=2",
        "step 2 /etc/x mode=644 uid=0 gid=0 text=a:b=c",
        "",
        "step 3 /bin mode=0 uid=0 gid=0 text=usr/bin",
        "step 4 /tmp mode=1777 uid=0 gid=0 room=4096:7",
        "step 5 - mode=0 uid=0 gid=0 room=8192:9",
        "step 6 /data mode=0 uid=1000 gid=1001",
        "step 7 /in mode=0 uid=0 gid=0 disk=vdb:erofs",
        "step 7 /out mode=0 uid=0 gid=0 room=65536:11 disk=vdc:erofs",
        "step 8 /proc/kcore mode=0 uid=0 gid=0",
        "step 9 /proc/sys mode=0 uid=0 gid=0",
    ]


@pytest.mark.parametrize("key", sorted(BASE))
def test_nothing_is_assumed(parse: Parse, key: str) -> None:
    """A key that says how strict the sandbox is has no default, and cannot be said twice."""
    assert parse(text(**{key: None})) == [f"wrong {key}"]
    assert parse(text(f"{key}={BASE[key]}")) == [f"wrong {key}"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hostname", ""),
        ("hostname", "a.b"),
        ("hostname", "a" * 65),
        ("uid", "4294967295"),  # -1, which setresuid(2) takes as "no change"
        ("uid", "-1"),
        ("uid", " 1"),
        ("uid", "0x1"),
        ("uid", "1:2"),
        ("gid", "18446744073709551617"),
        ("caps", ""),
        ("caps", "0x1"),
        ("caps", "A"),
        ("caps", "0" * 17),
        ("nnp", "0"),
        ("nnp", "yes"),
        ("seccomp", ""),
        ("seccomp", "0600000000"),
        ("seccomp", "06000000000000g0"),
        ("seccomp", "06" * 8 * 4097),
        ("memory", "0"),
        ("memory", "-1"),
        ("memory", "1G"),
        ("memory", "9223372036854775808"),
        ("swap", ""),
        ("pids", "0"),
        ("root", "vda"),
        ("root", "../sda:erofs"),
        ("root", "vda:erofs:x"),
        ("root", "/dev/vda:erofs"),
        ("overlay", "rw"),
        ("overlay", "0:10"),  # no bound, to a tmpfs
        ("overlay", "10:0"),
        ("overlay", "10"),
        ("overlay", "2000000000000000:10"),
        ("shm", "4096:10,mode=777"),
        ("sysfs", "2"),
    ],
)
def test_wrong_values(parse: Parse, key: str, value: str) -> None:
    """What is no plain number, name or size within bounds is refused, and the key is named."""
    assert parse(text(**{key: value})) == [f"wrong {key}"]


@pytest.mark.parametrize(
    "line",
    [
        "rlimit=16:1:1",
        "rlimit=7:2:1",
        "rlimit=7:1",
        "rlimit=7:unlimited:unlimited",
        "sysctl=kernel..sem=1",
        "sysctl=.kernel=1",
        "sysctl=kernel.=1",
        "sysctl=../x=1",
        "sysctl=kernel/sem=1",
        "sysctl=kernel.sem",
        "dir=relative:755:0:0",
        "dir=/:755:0:0",
        "dir=/a/:755:0:0",
        "dir=//a:755:0:0",
        "dir=/a/../b:755:0:0",
        "dir=/./a:755:0:0",
        "dir=/proc/x:755:0:0",
        "dir=/dev:755:0:0",
        "dir=/.ringfence:755:0:0",
        "dir=/a:4755:0:0",
        "dir=/a:8:0:0",
        "dir=/a:755:0",
        "dir=/a:755:0:0:0",
        "dir=/" + "a" * 4095 + ":755:0:0",
        "file=/a:644",
        "file=/sys/a:644:x",
        "link=/a:",
        "link=/a",
        "tmpfs=/tmp:0:1:1777:0:0",
        "tmpfs=/tmp:1:0:1777:0:0",
        "tmpfs=/tmp:1:1:1777:0",
        "tmpfs=/dev/shm:1:1:1777:0:0",
        "scratch=0:1",
        "share=/a:0",
        "disk=vdb:erofs:/in",
        "disk=vdb:erofs:/in:wo",
        "disk=vdb:erofs:/in:ro:1:1",
        "disk=vdb:erofs:/in:rw",
        "disk=vdb:erofs:/in:rw:0:1",
        "disk=vdb,x:erofs:/in:ro",
        "mask=/etc/shadow",
        "mask=/proc",
        "readonly=/tmp",
        "readonly=/proc/../etc",
    ],
)
def test_wrong_lines(parse: Parse, line: str) -> None:
    """A step that leads elsewhere, has no bound, or has a field too many or too few is refused by its key."""
    assert parse(text(line)) == [f"wrong {line.partition('=')[0]}"]


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"uid\0", b"=\0", b"unknown=1\0", b"uid=1", text() + b"more", text() + b"\0", text("UID=1")],
)
def test_no_text(parse: Parse, data: bytes) -> None:
    """Bytes that are not lines of known keys, each with its NUL, are refused as a whole."""
    assert parse(data) == ["wrong setup"]


def test_own_names_only_as_names(parse: Parse) -> None:
    """What only begins like a path of the kernel's or the agent's is the plan's to use."""
    assert parse(text("dir=/procs:755:0:0", "dir=/.ringfenced:755:0:0", "dir=/devel:755:0:0"))[-1].startswith(
        "step 1"
    )


def test_steps_are_bounded(parse: Parse) -> None:
    """As many steps as there is room for, not one more."""
    assert len(parse(text(*["dir=/a:755:0:0"] * 2048))) > 2048
    assert parse(text(*["dir=/a:755:0:0"] * 2049)) == ["wrong dir"]


@given(
    st.lists(
        st.sampled_from([b"dir", b"=", b":", b"/", b"..", b"1", b"\0", b"uid", b"disk", b"rw", b"\xff"]),
        max_size=40,
    )
)
def test_any_bytes(parse: Parse, pieces: list[bytes]) -> None:
    """Whatever follows a good text, the parser ends with it all taken or with a name."""
    found = parse(text() + b"".join(pieces))
    assert found
    assert found[0].startswith(("hostname sandbox-1", "wrong "))
