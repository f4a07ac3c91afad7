"""Firecracker in its ring: the link by vsock, what the ring has for it, its end, and a boot where there is one to boot.

Where no Firecracker or no KVM is, a program in its place shows that the ring is as the machine's document has it. It
makes no machine, and nothing here that uses it says that one boots.
"""

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from test_link import FIRST_WORDS_BYTES, Bridge, Guest

from agents import WAIT_S, cpu_ticks, eventually
from boxes import Sandboxes, bind
from commands import refused
from commands import ringfence as ringfence_command
from needs import COMPILERS, PROBES
from ringfence.errors import HostError
from ringfence.host import cache, vmm
from ringfence.host.facts import Host, Runtime
from ringfence.proof.observe import status
from ringfence.runtime.door import words
from ringfence.sandbox import launch
from ringfence.sandbox.prepare import Request, plan_for

HERE = Path(__file__).parent
ANSWER = b"OK 1073741824\n"
SLEEP = ["/bin/sleep", "1000"]

# The link: a real bridge, and the test at the other end of the socket, as Firecracker is.


class Dialled:
    """A bridge that is to find its link at a socket, and that socket, if it is there."""

    def __init__(
        self, directory: Path, *, listens: bool = True, vmm_command: list[str] | None = None
    ) -> None:
        self.path = str(directory / "vsock")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.settimeout(WAIT_S)
        if listens:
            self.listen()
        self.bridge = Bridge(directory, vmm_command or SLEEP, wait=f"vsock:{self.path}")

    def listen(self) -> None:
        self.listener.bind(self.path)
        self.listener.listen(8)

    def asked(self) -> socket.socket:
        """The next connection, which begins by asking for the port of the link."""
        sock, _ = self.listener.accept()
        sock.settimeout(WAIT_S)
        assert sock.recv(len(b"CONNECT 1\n"), socket.MSG_WAITALL) == b"CONNECT 1\n"
        return sock

    def guest(self) -> Guest:
        sock = self.asked()
        sock.sendall(ANSWER)
        return Guest(sock)

    def close(self) -> None:
        self.bridge.close()
        self.listener.close()


Dials = Callable[..., Dialled]


@pytest.fixture
def dials(tmp_path: Path) -> Iterator[Dials]:
    with contextlib.ExitStack() as stack:

        def start(**more: object) -> Dialled:
            place = tmp_path / str(len(list(tmp_path.iterdir())))
            place.mkdir()
            found = Dialled(place, **more)  # type: ignore[arg-type]
            stack.callback(found.close)
            return found

        yield start


pytestmark = pytest.mark.requires("root", "userns")


def boots(guest: Guest, bridge: Bridge) -> None:
    guest.boot()
    guest.ready()
    bridge.ready()
    guest.sock.close()


def test_the_link_by_vsock(dials: Dials) -> None:
    """CONNECT, OK, and from there on the link; what comes right behind the answer is the guest's first word."""
    dialled = dials()
    sock = dialled.asked()
    guest = Guest(sock)
    hello = struct.pack("<II", 1, 0) + b"6.1.0-test\x001234\0"
    sock.sendall(ANSWER + struct.pack("<IBBH", len(hello), 1, 0, 0xFFFF) + hello)
    guest.expect(2)
    guest.send(3)
    guest.ready()
    dialled.bridge.ready()
    sock.close()


def test_an_answer_in_pieces(dials: Dials) -> None:
    """The line may come byte by byte."""
    dialled = dials()
    sock = dialled.asked()
    for byte in ANSWER:
        sock.sendall(bytes([byte]))
    boots(Guest(sock), dialled.bridge)


def test_a_guest_that_does_not_listen_yet(dials: Dials) -> None:
    """A VMM hangs up while nobody in the guest listens; the bridge asks again until somebody does."""
    dialled = dials()
    for _ in range(5):
        dialled.asked().close()
    sock = dialled.asked()
    sock.sendall(b"OK 1")  # and half an answer is none
    sock.close()
    boots(dialled.guest(), dialled.bridge)


def test_a_socket_that_is_not_there_yet(dials: Dials) -> None:
    """The VMM makes it some time after it was started."""
    dialled = dials(listens=False)
    assert dialled.bridge.lives(0.2)
    dialled.listen()
    boots(dialled.guest(), dialled.bridge)


def test_two_machines_with_one_id(dials: Dials) -> None:
    """Each bridge reaches the guest behind its own socket, and no other, though all guests have the same number."""
    one, other = dials(), dials()
    guests = [one.guest(), other.guest()]
    for guest, release in zip(guests, (b"one", b"other"), strict=True):
        guest.send(1, struct.pack("<II", 1, 0) + release + b"\x001\0")
        guest.expect(2)
    for dialled, release in ((one, "one"), (other, "other")):
        eventually(lambda dialled=dialled: dialled.bridge.words.read_text())
        assert dialled.bridge.words.read_text() == f"guest kernel {release}, booted in 1 ms\n"
    for guest in guests:
        guest.sock.close()


@pytest.mark.parametrize(
    "answer",
    [b"NO\n", b"\n", b"OK \n", b"OK x\n", b"OK 1 \n", b"ok 1\n", b"OK 1\r\n", b"\0" * 16, b"OK 12345678901234567\n"],
)  # fmt: skip
def test_what_is_no_vsock(dials: Dials, answer: bytes) -> None:
    """Any other answer is the end: whatever is there, it is not what was asked for."""
    dialled = dials()
    with dialled.asked() as sock:
        sock.sendall(answer)
        assert dialled.bridge.wait() == 125
    assert dialled.bridge.words.read_text() == "the VMM's socket does not answer as vsock does\n"


def test_nobody_answers_and_the_launcher_goes(dials: Dials) -> None:
    """A guest that never comes costs the launcher's patience only."""
    silent, absent = dials(), dials(listens=False)
    with silent.asked():
        for dialled in (silent, absent):
            assert dialled.bridge.lives()
            dialled.bridge.connection.close()
            assert dialled.bridge.wait() in (0, 125)


def test_waiting_costs_nothing(dials: Dials) -> None:
    """A bridge that waits for its guest sleeps: it looks again every few milliseconds at most."""
    dialled = dials(listens=False)
    pid = dialled.bridge.host_pid()
    before = cpu_ticks(pid)
    assert dialled.bridge.lives(1.0)
    assert cpu_ticks(pid) - before < 20  # of 100


@pytest.mark.parametrize("where", ["vsock:", "vsock:relative", "vsock:/" + "x" * 200, "2", "vsock"])
def test_a_way_that_is_none(tmp_path: Path, where: str) -> None:
    """A path that no socket can have, or another word, is refused before the VMM is started."""
    bridge = Bridge(tmp_path, ["/bin/touch", str(tmp_path / "started")], wait=where)
    try:
        assert bridge.wait() == 125
    finally:
        bridge.close()
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo oops; exit 148", "oops\nthe VMM exited with status 148\n"),
        ("kill -9 $$", "the VMM was killed by signal 9\n"),
        ("exit 0", ""),
    ],
)
def test_how_a_vmm_ended(dials: Dials, script: str, said: str) -> None:
    """One that dies while it is being dialled is the end, and its status stands behind its own last words."""
    dialled = dials(listens=False, vmm_command=["/bin/sh", "-c", script])
    assert dialled.bridge.wait() == 125
    assert dialled.bridge.words.read_text() == said
    assert len(said) < FIRST_WORDS_BYTES


# The ring


@pytest.fixture(scope="module")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Compile the program in Firecracker's place; with a status it says a line of a log and exits with it."""

    def compiled(exit_status: int = 0) -> Path:
        compiler = next(
            name for name in COMPILERS if subprocess.run(["which", name], capture_output=True).stdout
        )
        program = tmp_path_factory.mktemp("firecracker") / "firecracker"
        flags = ["-static", "-O1", "-Wall", "-Wextra", "-Werror", f"-DSTATUS={exit_status}"]
        subprocess.run([compiler, *flags, "-o", program, HERE / "firecracker_double.c"], check=True)
        return program

    return compiled


Plans = Callable[..., launch.Running]


@pytest.fixture
def started(home: Path, doubles: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Plans]:
    """Prepare a sandbox with the double; the facts say that KVM works, for it has no CPU that would need it."""
    prepared: list[launch.Running] = []
    detected = cache.detect_cached(f"{home}/host.json")
    monkeypatch.setenv("RINGFENCE_PLAN_CACHE", "off")

    def prepare(exit_status: int = 0, **overrides: object) -> launch.Running:
        program = str(doubles(exit_status))
        runtime = Runtime(path=program, version=(1, 7, 0), version_text="Firecracker v1.7.0")
        host: Host = msgspec.structs.replace(
            detected, kvm="works", runtimes={**detected.runtimes, "firecracker": runtime}
        )
        monkeypatch.setattr(cache, "detect_cached", lambda _: host)
        monkeypatch.setattr(vmm, "host_key", lambda: program)
        fields = {"isolation": "microvm", **overrides}
        plan = plan_for(Request(overrides=fields, vmm="firecracker", runtime="crun"))
        running = launch.prepare(plan, name="", argv=["true"], detached=False, remove=True)
        prepared.append(running)
        return running

    yield prepare
    for running in prepared:
        running.close()


ring = pytest.mark.requires("crun", "image:base", "kernel", "mkfs.erofs", "compiler", "x86_64", "kvm:device")


@ring
def test_the_ring_has_what_the_document_names(started: Plans, tmp_path: Path) -> None:
    """The VMM can read the image, the copy of a mount, kernel and initrd, and write its metrics; nothing else.

    Its socket is found by the bridge, though the first one who asks is sent away, and an agent behind it is heard.
    """
    os.chmod(tmp_path, 0o755)
    (tmp_path / "file").write_text("x")
    running = started(**{"filesystem.mounts": [bind(tmp_path, "/data")]})
    launch.start(running)
    said = words(running.entry.directory).splitlines()
    assert said[:3] == ["word --no-api", "word --config-file", "word /machine.json"]
    found = dict(line.rsplit(": ", 1) for line in said if ": " in line and not line.startswith("asked"))
    assert found == {
        "read /disks/vda": "yes",
        "write /disks/vda": "no",
        "read /proc/self/fd/9": "yes",
        "write /proc/self/fd/9": "no",
        "read /kernel": "yes",
        "read /initrd": "yes",
        "write /kernel": "no",
        "write /machine.json": "no",
        "write /run/metrics": "yes",
        "make /new": "no",
        "make /disks/new": "no",
        "open /dev/kvm": "yes",  # a node of its own: the host's may be root's alone
    }
    assert [line for line in said if line.startswith("asked")] == ["asked: CONNECT 1"] * 2
    assert running.guest is not None
    assert running.entry.record()["runtime"] == "firecracker"


@ring
def test_the_ring_leaves_it_no_rights(started: Plans) -> None:
    """Like QEMU: no capabilities, a filter, no new privileges, an id of its own range."""
    running = started()
    launch.start(running)
    (child,) = Path(f"/proc/{running.agent_pid}/task/{running.agent_pid}/children").read_text().split()
    text = Path(f"/proc/{child}/status").read_text()
    seen = {name: value for name, (value, _) in status(text, "status").items()}
    assert all(value == [] for name, value in seen.items() if name.startswith("capabilities."))
    assert (seen["seccomp.mode"], seen["no_new_privileges"]) == ("filter", True)
    uid = int(next(line for line in text.splitlines() if line.startswith("Uid:")).split()[1])
    assert uid == running.instance.base + 1000


@ring
def test_its_end_is_told_in_its_own_words(started: Plans) -> None:
    """A Firecracker that gives up is one line: what it said last, and what its status means."""
    running = started(148)
    with pytest.raises(HostError) as error:
        launch.start(running)
    assert str(error.value).startswith(
        "the microVM could not start the sandbox: the disk is of glass;"
        " Firecracker exited with status 148: it made a system call that its own seccomp filter refuses"
    )


# The command line


def test_without_firecracker_or_kvm(home: Path) -> None:
    """Never QEMU in its place, and no emulation, which was allowed: one line, 125."""
    if not PROBES["firecracker"]():
        pytest.skip("needs a machine without them: Firecracker and KVM that works are here")
    for more in ((), ("--allow-emulation",)):
        done = ringfence_command("run", "-i", "microvm", "--vmm", "firecracker", *more, "--", "true")
        refused(done, 125, "Firecracker", "--vmm qemu" if more else "")


# A boot, where there is one


@pytest.mark.requires("firecracker", "kernel", "mkfs.erofs", "image:base", "crun")
def test_a_boot(machines: Sandboxes) -> None:
    """Where Firecracker and KVM are, a job runs in its machine, and the proof holds with hardware around it."""
    result = machines.run(["sh", "-c", "uname -r; cat; echo no >&2; exit 7"], vmm="firecracker", stdin=b"in")
    assert (result.exit_status, result.stderr) == (7, b"no\n")
    assert result.stdout.endswith(b"in")
    assert result.proof is not None
    assert result.proof["holds"]
    assert not [item for item in result.proof["unenforced"] if item["field"] == "isolation"]


@pytest.mark.requires("firecracker", "kernel", "mkfs.erofs", "image:base", "crun")
def test_two_machines_at_once(machines: Sandboxes) -> None:
    """Where they are, two guests have the same vsock id and each hears its own host only."""
    names = ("one", "other")
    with ThreadPoolExecutor(2) as pool:
        ran = [pool.submit(machines.run, ["cat"], vmm="firecracker", stdin=name.encode()) for name in names]
        assert [result.result().stdout for result in ran] == [name.encode() for name in names]


@pytest.mark.requires("firecracker", "kernel", "mkfs.erofs", "image:base", "crun")
def test_memory_is_the_policys(machines: Sandboxes) -> None:
    """Where they are, a job beyond its limit is killed by the guest's kernel, and that is told."""
    hog = machines.run(["python3", "-c", "b'x' * (1 << 30)"], {"limits.memory": "64MiB"}, vmm="firecracker")
    assert hog.exit_status == 137
