"""The agent's build, its parser under the fuzzer, and the host's half of its protocol."""

import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import SandboxError
from ringfence.sandbox import protocol
from ringfence.sandbox.protocol import Connection

AGENT = Path(__file__).resolve().parents[2] / "agent"
MUSL = shutil.which("musl-gcc")


def build(directory: Path, *arguments: str) -> bytes:
    """Copy the sources to `directory`, build there, and return the binary."""
    shutil.copytree(AGENT, directory, ignore=shutil.ignore_patterns("build"))
    subprocess.run(
        ["make", "-s", "-C", str(directory), *arguments], check=True, env={**os.environ, "LC_ALL": "C"}
    )
    return (directory / "build/ringfence-agent").read_bytes()


def test_same_bytes_wherever_it_is_built(tmp_path: Path) -> None:
    """Two builds in two directories give one binary, small and without a word about where it was built."""
    one = build(tmp_path / "a")
    assert one == build(tmp_path / "some/other/place")
    assert str(tmp_path).encode() not in one
    if MUSL:
        assert len(one) < 112 * 1024


def test_linked_for_a_sandbox(tmp_path: Path) -> None:
    """The binary needs no interpreter and no library, and its stack is not executable."""
    build(tmp_path / "a")
    headers = subprocess.check_output(
        ["readelf", "-lW", str(tmp_path / "a/build/ringfence-agent")], text=True
    )
    assert "INTERP" not in headers
    (stack,) = [line.split() for line in headers.splitlines() if "GNU_STACK" in line]
    assert stack[6] == "RW"
    assert any("GNU_RELRO" in line for line in headers.splitlines())


def test_glibc_will_do(tmp_path: Path) -> None:
    """Where musl is missing the sources build without a warning against a static glibc."""
    build(tmp_path / "a", "CC=gcc")
    binary = tmp_path / "a/build/ringfence-agent"
    assert subprocess.check_output([binary, "--version"]) == b"%d\n" % protocol.VERSION


def has_fuzzer(directory: Path) -> bool:
    clang = shutil.which("clang")
    source = directory / "probe.c"
    source.write_text("int LLVMFuzzerTestOneInput(const char *d, unsigned long n) { return 0 * *d * n; }\n")
    command = [str(clang), "-fsanitize=fuzzer,address,undefined", "-o", str(directory / "probe"), str(source)]
    return clang is not None and subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_fuzz_parser(tmp_path: Path) -> None:
    """Some seconds of coverage-guided fuzzing find no memory error in the parser."""
    if not has_fuzzer(tmp_path):
        pytest.skip("needs clang with its fuzzer and sanitizer runtime (libclang-rt-dev)")
    shutil.copytree(AGENT, tmp_path / "agent", ignore=shutil.ignore_patterns("build"))
    command = ["make", "-s", "-C", str(tmp_path / "agent"), "fuzz", "SECONDS=4"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "stat::number_of_executed_units" in result.stderr


# The host's half


@pytest.mark.parametrize(
    ("argv", "env", "cwd"),
    [
        ([], [], b"/"),
        ([b"a"], [], b"relative"),
        ([b"a"], [], b""),
        ([b"a\0b"], [], b"/"),
        ([b"a"], [b"A=\0"], b"/"),
        ([b"a"], [], b"/\0"),
        ([b""] * (1 << 18), [], b"/"),
        ([b"x" * (4 << 20)], [], b"/"),
    ],
)
def test_bad_start_is_refused_here(argv: list[bytes], env: list[bytes], cwd: bytes) -> None:
    """What the agent would refuse never leaves the host."""
    with pytest.raises(SandboxError):
        protocol.encode_start(argv, env, cwd)


def test_start_bytes() -> None:
    """START is laid out as PROTOCOL.md has it."""
    frame = protocol.encode_start(
        [b"a", b"bc"],
        [b"D=e"],
        b"/f",
        flags=3,
        deadline_ms=0x01020304,
        output_limit_bytes=5,
        cols=80,
        rows=24,
    )
    head = "28000000 01 03 0000  04030201 00000000 0500000000000000 5000 1800 02000000 01000000"
    assert frame == bytes.fromhex(head) + b"/f\0a\0bc\0D=e\0"


def pair() -> tuple[Connection, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    return Connection(ours), theirs


@given(st.binary(max_size=64), st.integers(0, 5))
def test_what_a_sandbox_sends_is_checked(data: bytes, descriptors: int) -> None:
    """Any bytes with any descriptors give a known frame, the end, or one error; no descriptor is kept."""
    connection, theirs = pair()
    reading, writing = os.pipe()
    rights = [
        (
            socket.SOL_SOCKET,
            socket.SCM_RIGHTS,
            b"".join(writing.to_bytes(4, "little") for _ in range(descriptors)),
        )
    ]
    if data:
        theirs.sendmsg([data], rights if descriptors else [])
    theirs.close()
    os.close(writing)
    try:
        while (frame := connection.recv()) is not None:
            kind, flags, payload, received = frame
            if kind == protocol.REPORTED:
                assert len(payload) <= 64
            else:
                assert (kind, len(payload)) in {(65, 8), (66, 8), (67, 8), (68, 12)}
            assert flags == data[5]
            assert len(received) <= (kind == protocol.PREPARED)
            for descriptor in received:
                os.close(descriptor)
    except SandboxError:
        pass
    connection.close()
    assert os.read(reading, 1) == b""
    os.close(reading)


@pytest.mark.parametrize(
    ("length", "kind", "fits"),
    [(0, 69, True), (1 << 18, 69, True), ((1 << 18) + 1, 69, False), (0xFFFFFFFF, 69, False), (0, 70, False)],
)
def test_length_of_an_answer_is_checked(length: int, kind: int, fits: bool) -> None:
    """A report has a length of its own, up to a bound; a longer one is refused before it is read."""
    connection, theirs = pair()
    theirs.sendall(length.to_bytes(4, "little") + bytes([kind, 0, 0, 0]))
    connection.sock.settimeout(0.05)
    if not fits:
        with pytest.raises(SandboxError):
            connection.recv()
    elif length:
        with pytest.raises(TimeoutError):
            connection.recv()
    else:
        assert connection.recv() == (kind, 0, b"", [])
    connection.close()
    theirs.close()


def test_large_report_arrives_whole() -> None:
    """A report that is larger than any socket's buffer is one frame to who receives it."""
    connection, theirs = pair()
    payload = b"status\0" + b"x" * ((1 << 18) - 8) + b"\0"
    sender = threading.Thread(target=theirs.sendall, args=(protocol.encode(protocol.REPORTED, 0, payload),))
    sender.start()
    frame = connection.recv()
    sender.join()
    assert frame == (protocol.REPORTED, 0, payload, [])
    assert len(protocol.decode_reported(payload)["status"]) == (1 << 18) - 8
    connection.close()
    theirs.close()


NAMES = sorted(protocol.REPORT_NAMES)


@given(
    st.dictionaries(
        st.sampled_from(NAMES), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
    )
)
def test_report_is_read(texts: dict[str, str]) -> None:
    """Names and texts come out as they went in; what is not there is missing."""
    payload = b"".join(name.encode() + b"\0" + text.encode() + b"\0" for name, text in texts.items())
    assert protocol.decode_reported(payload) == texts


@given(st.lists(st.sampled_from([b"\0", b"status", b"limits", b"x", b"\xff", b"", b"\0\0"]), max_size=30))
def test_report_from_a_liar(pieces: list[bytes]) -> None:
    """Any other bytes are texts of known names, which can be printed, or one error."""
    try:
        told = protocol.decode_reported(b"".join(pieces))
    except SandboxError:
        return
    assert set(told) <= protocol.REPORT_NAMES
    "".join(told.values()).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"status",
        b"status\0",
        b"status\0text",
        b"status\0a\0limits\0",
        b"status\0a\0status\0b\0",
        b"environ\0a\0",
        b"\0\0",
        b"status\0" + b"x" * (1 << 18) + b"\0",
        b"\0" * (1 << 18),
    ],
)
def test_report_that_is_none(payload: bytes) -> None:
    """A report that ends in the middle, repeats, goes on or tells of something else is refused."""
    with pytest.raises(SandboxError):
        protocol.decode_reported(payload)


def test_report_that_is_no_text() -> None:
    """Bytes that are no UTF-8 come out as escapes that can be printed."""
    assert protocol.decode_reported(b"hostname\0a\xffb\0") == {"hostname": "a\\xffb"}


def test_report_bytes() -> None:
    """REPORT is a header and no more."""
    assert protocol.encode_report() == bytes.fromhex("00000000 06 00 0000")


def test_timeout_loses_nothing() -> None:
    """A frame that comes in pieces is taken up again where recv gave up."""
    connection, theirs = pair()
    connection.sock.settimeout(0.01)
    frame = protocol.encode(protocol.EXITED, 0, bytes(range(12)))
    for piece in (frame[:3], frame[3:8], frame[8:15]):
        theirs.send(piece)
        with pytest.raises(TimeoutError):
            connection.recv()
    theirs.send(frame[15:])
    assert connection.recv() == (protocol.EXITED, 0, bytes(range(12)), [])
    theirs.close()
    assert connection.recv() is None
    with pytest.raises(SandboxError):
        connection.send(protocol.encode_go())
    connection.close()


@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=40)), max_size=6), st.data())
def test_log_is_read_as_far_as_it_is_whole(written: list[tuple[int, bytes]], data: st.DataObject) -> None:
    """Cut anywhere, a log gives its whole records, and reading goes on at the last offset."""
    log = b"".join(
        (7).to_bytes(8, "little") + len(p).to_bytes(4, "little") + bytes([s, 0, 0, 0]) + p for s, p in written
    )
    cut = data.draw(st.integers(0, len(log)))
    first = list(protocol.read_log(log[:cut]))
    offset = first[-1][0] if first else 0
    rest = list(protocol.read_log(log, offset))
    assert [(s, p) for _, _, s, p in first + rest] == written


def test_end_record() -> None:
    """The end record's fields come out as they went in."""
    payload = b"".join(n.to_bytes(4, "little") for n in (137, 9, 3, 0)) + (5).to_bytes(8, "little")
    assert protocol.decode_end(payload) == (137, 9, 3, 5)
