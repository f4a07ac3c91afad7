"""The guest's init in real virtual machines: QEMU, a kernel, our initramfs, and the link spoken by hand.

No bridge and no launcher: what is shown here is what the guest makes of a setup text, and what it says when it cannot.
"""

import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import agents
from ringfence.errors import HostError
from ringfence.image import disks, store
from ringfence.linux.paths import state_dir
from ringfence.runtime.initrd import initrd
from ringfence.runtime.microvm.kernel import find_kernel
from ringfence.sandbox import protocol

pytestmark = [pytest.mark.requires("image:base", "mkfs.erofs", "compiler", "x86_64")]

QEMU = "qemu-system-x86_64"
MACHINE = 0xFFFF
HELLO, SETUP, SETUP_DONE, SETUP_FAILED, OPEN, CLOSE, CONTROL = 1, 2, 3, 4, 8, 9, 10
DATA, END, CREDIT, STOP, POWEROFF = 16, 17, 18, 19, 48
BOOT_S = 60  # on a machine that has other things to do
ANSWER_S = 60
UID, GID = 1000, 1001
ENAMETOOLONG, EPERM, EACCES, ENOENT, EROFS, EAGAIN, ENOSPC = 36, 1, 13, 2, 30, 11, 28

# Answers ENAMETOOLONG, which nothing else does here, to sethostname(2) on x86_64, and allows all else.
FILTER = (
    struct.pack("<HBBI", 0x20, 0, 0, 0)
    + struct.pack("<HBBI", 0x15, 0, 1, 170)
    + struct.pack("<HBBI", 0x06, 0, 0, 0x00050000 | ENAMETOOLONG)
    + struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)
)
SETTINGS = {
    "hostname": "guest-7",
    "uid": str(UID),
    "gid": str(GID),
    "caps": "0",
    "nnp": "1",
    "seccomp": FILTER.hex(),
    "memory": str(48 << 20),
    "swap": "0",
    "pids": "20",
    "root": "vda:erofs",
    "overlay": "ro",
    "shm": "1048576:100",
    "sysfs": "0",
}
STEPS = (
    "rlimit=7:64:128",
    "rlimit=4:0:0",
    "sysctl=kernel.msgmax=4096",
    "sysctl=net.ipv4.ip_default_ttl=33",
    "file=/etc/hosts:644:127.0.0.1 localhost\n",
    "file=/etc/hostname:644:guest-7\n",
    "dir=/work:755:0:0",
    "dir=/data:755:0:0",
    "dir=/in:755:0:0",
    "dir=/out:755:0:0",
    "dir=/tmp:755:0:0",
    "link=/shortcut:usr/bin",
    "tmpfs=/tmp:1048576:100:1777:0:0",
    "scratch=2097152:50",
    f"share=/work:{UID}:{GID}",
    f"share=/data:{UID}:{GID}",
    "disk=vdb:erofs:/in:ro",
    "disk=vdb:erofs:/out:rw:1048576:20",
    "dir=/tmp/below:700:1:2",
    "mask=/proc/interrupts",
    "mask=/proc/fs",
    "mask=/proc/no-such-file",
    "readonly=/proc/sys",
    "readonly=/proc/stat",
    "readonly=/proc/no-such-file",
)


def _qemu() -> str:
    return "" if shutil.which(QEMU) else f"{QEMU} is not installed"


class Kernel:
    """What to boot: RINGFENCE_TEST_KERNEL is a file, or a kernel of the store; without it the default one is taken."""

    def __init__(self) -> None:
        given = os.environ.get("RINGFENCE_TEST_KERNEL", "")
        self.acpi = False
        self.cmdline = ""
        self.modules: list[tuple[str, bytes]] = []
        if "/" in given:
            self.path = given
            return
        found = find_kernel(state_dir(), given)
        self.path, self.acpi, self.cmdline = found.path, found.acpi, found.cmdline
        self.modules = [(os.path.basename(path), Path(path).read_bytes()) for path in found.modules]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    reason = _qemu()
    try:
        found = Kernel()
    except HostError as error:
        reason = reason or f"{error} (or name one in RINGFENCE_TEST_KERNEL)"
    if reason and os.environ.get("RINGFENCE_STRICT"):
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(f"needs a virtual machine: {reason}")
    return found


@pytest.fixture(scope="module")
def disk(probes: Path) -> Iterator[Path]:
    """A disk image with the probe and a file, whose directory belongs to the job."""
    with tempfile.TemporaryDirectory(prefix="ringfence-disk-") as directory:
        content = Path(directory) / "content"
        content.mkdir(mode=0o751)
        shutil.copy(probes / "guest", content / "probe")
        (content / "note").write_text("from the host\n")
        for path in (content, *content.iterdir()):
            os.chown(path, UID, GID)
        image = Path(directory) / "disk.erofs"
        subprocess.run(["mkfs.erofs", "--quiet", str(image), str(content)], check=True, capture_output=True)
        yield image


class Job:
    """What came of one job: its output, and how it ended."""

    def __init__(self) -> None:
        self.streams = {1: bytearray(), 2: bytearray()}
        self.open = {0, 1, 2}
        self.code = -1
        self.flags = 0
        self.closed = False

    @property
    def out(self) -> str:
        return self.streams[1].decode()

    def over(self) -> bool:
        return self.closed and not self.open


class Machine:
    """A booted guest. All of its frames are read by whoever waits for one."""

    def __init__(self, kernel: Kernel, drives: Sequence[Path | str]) -> None:
        self.console = b""
        self.jobs: dict[int, Job] = {}
        self.directory = tempfile.TemporaryDirectory(prefix="ringfence-boot-")
        image = Path(self.directory.name) / "initrd"
        image.write_bytes(initrd(Path(agents.binary()).read_bytes(), kernel.modules))
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(BOOT_S)
        with theirs:
            self.process = subprocess.Popen(
                self._command(kernel, image, theirs.fileno(), drives),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        self._reader = threading.Thread(target=self._read_console)
        self._reader.start()

    def _command(self, kernel: Kernel, image: Path, link: int, drives: Sequence[Path | str]) -> list[str]:
        options = "microvm,isa-serial=off" + ("" if kernel.acpi else ",acpi=off,rtc=off")
        words = f"reboot=t panic=-1 quiet console=hvc0 {kernel.cmdline}"
        words += "" if kernel.acpi else " lpj=100000"
        command = [QEMU, "-M", options, "-accel", "tcg", "-m", "256", "-nodefaults", "-no-user-config"]
        command += [
            "-nographic",
            "-no-reboot",
            "-kernel",
            kernel.path,
            "-initrd",
            str(image),
            "-append",
            words,
        ]
        command += ["-cpu", "qemu64" if kernel.acpi else "qemu64,-tsc", "-device", "virtio-serial-device"]
        command += ["-chardev", f"socket,id=link,fd={link}"]
        command += ["-device", "virtserialport,chardev=link,name=link"]
        command += ["-chardev", "stdio,id=console,signal=off", "-device", "virtconsole,chardev=console"]
        for number, drive in enumerate(drives):
            command += ["-drive", f"if=none,id=d{number},file={drive},format=raw,readonly=on"]
            command += ["-device", f"virtio-blk-device,drive=d{number}"]
        command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
        return command

    def _read_console(self) -> None:
        assert self.process.stdout is not None
        for piece in iter(lambda: os.read(self.process.stdout.fileno(), 4096), b""):  # type: ignore[union-attr]
            self.console += piece

    def send(self, kind: int, payload: bytes = b"", *, channel: int = MACHINE, stream: int = 0) -> None:
        self.sock.sendall(struct.pack("<IBBH", len(payload), kind, stream, channel) + payload)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            assert piece, f"the machine is gone: {self.console!r}"
            data += piece
        return data

    def receive(self) -> tuple[int, int, int, bytes]:
        """Kind, stream, channel and payload of the next frame."""
        length, kind, stream, channel = struct.unpack("<IBBH", self._exactly(8))
        return kind, stream, channel, self._exactly(length)

    def hello(self) -> tuple[str, int]:
        """Release of the kernel, and the milliseconds that the guest says it took to get here."""
        kind, _, channel, payload = self.receive()
        assert (kind, channel) == (HELLO, MACHINE)
        assert payload[:8] == struct.pack("<II", 1, 0)
        release, milliseconds, rest = payload[8:].split(b"\0")
        assert rest == b""
        return release.decode(), int(milliseconds)

    def set_up(self, text: bytes) -> tuple[int, bytes]:
        """Send SETUP, return the answer's kind and payload."""
        self.send(SETUP, struct.pack("<Q", time.time_ns()) + os.urandom(64) + text)
        kind, _, channel, payload = self.receive()
        assert channel == MACHINE
        return kind, payload

    # Jobs

    def control(self, channel: int) -> tuple[int, bytes]:
        """The next frame of the agent's on this channel; what comes on other ones in between is dealt with."""
        while True:
            kind, stream, where, payload = self.receive()
            if kind == CONTROL and where == channel:
                assert struct.unpack("<I", payload[:4])[0] == len(payload) - 8
                return payload[4], payload[8:]
            self._note(kind, stream, where, payload)

    def _note(self, kind: int, stream: int, channel: int, payload: bytes) -> None:
        job = self.jobs[channel]
        if kind == DATA:
            job.streams[stream] += payload
            self.send(CREDIT, struct.pack("<I", len(payload)), channel=channel, stream=stream)
        elif kind == END:
            self.send(STOP, channel=channel, stream=stream)
            job.open.remove(stream)
        elif kind == STOP:
            job.open.remove(stream)
        elif kind == CLOSE:
            job.closed = True
        elif kind == CONTROL:
            assert payload[4] == protocol.EXITED, payload
            job.code, _, job.flags = protocol.decode_exited(payload[8:])
        else:
            assert kind == CREDIT

    def start(self, *argv: str, channel: int, flags: int = 0) -> Job:
        """Have a job prepared on `channel`, whose READY must be there, or come first."""
        job = self.jobs[channel] = Job()
        assert self.control(channel)[0] == protocol.READY
        words = [word.encode() for word in argv]
        frame = protocol.encode_start(words, [b"PATH=/usr/bin:/bin", b"LC_ALL=C"], b"/", flags=flags)
        self.send(CONTROL, frame, channel=channel)
        assert self.control(channel)[0] == protocol.PREPARED
        return job

    def run(self, *argv: str) -> Job:
        """Run one more job beside the main one, without input, to its end."""
        self.send(OPEN, channel=1)
        job = self.start(*argv, channel=1)
        self.send(END, channel=1, stream=0)
        while not job.over():
            self._note(*self.receive())
        self.send(CLOSE, channel=1)
        return job

    def sh(self, script: str) -> str:
        """What a shell's script prints; it must succeed."""
        job = self.run("sh", "-c", script)
        assert (job.code, bytes(job.streams[2])) == (0, b"")
        return job.out

    def probe(self, *words: str) -> Job:
        return self.run("/in/probe", *words)

    def ended(self) -> int:
        """The VMM's exit status, when the guest has switched off by itself."""
        return self.process.wait(ANSWER_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()  # type: ignore[union-attr]
        self.sock.close()
        self.directory.cleanup()


def text(*steps: str, **changed: str) -> bytes:
    lines = [f"{key}={value}" for key, value in {**SETTINGS, **changed}.items()]
    return b"".join(line.encode() + b"\0" for line in [*lines, *steps])


def drives(disk: Path) -> list[Path | str]:
    found = store.resolve(state_dir(), "base:latest")
    assert found is not None
    return [disks.disk(state_dir(), found), disk]


@pytest.fixture(scope="module")
def machine(kernel: Kernel, disk: Path) -> Iterator[Machine]:
    """A guest with a job that may do nothing, and a main job that waits for the end of its input."""
    made = Machine(kernel, drives(disk))
    try:
        made.hello()
        assert made.set_up(text(*STEPS)) == (SETUP_DONE, b"")
        made.start("cat", channel=0)
        yield made
        # The end of the main job is the end of all: the input ends, cat leaves, the machine is switched off.
        made.send(END, channel=0, stream=0)
        job = made.jobs[0]
        while job.code < 0 or job.open:
            made._note(*made.receive())
        assert job.code == 0
        made.send(POWEROFF)
        assert made.ended() == 0
    finally:
        made.close()


def fields(machine: Machine, name: str) -> dict[str, str]:
    return dict(
        line.split(":\t", 1) for line in machine.sh(f"cat /proc/{name}/status").splitlines() if ":\t" in line
    )


@pytest.mark.parametrize("process", ["self", "1"])
def test_credentials(machine: Machine, process: str) -> None:
    """The job, and the agent before it, have the job's ids, no group, no capability, no new privileges, one filter."""
    status = fields(machine, process)
    assert status["Uid"].split() == [str(UID)] * 4
    assert status["Gid"].split() == [str(GID)] * 4
    assert status["Groups"].split() == []
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == ("1", "2", "1")


def test_rlimits(machine: Machine) -> None:
    """Limits of the text are the job's, soft and hard."""
    limits = machine.sh("cat /proc/self/limits")
    assert re.search(r"^Max open files +64 +128 ", limits, re.M)
    assert re.search(r"^Max core file size +0 +0 ", limits, re.M)


def test_mounts(machine: Machine) -> None:
    """What is mounted is what the text says, each with its flags and size, and nothing of the initramfs."""
    found = {}
    for line in machine.sh("cat /proc/self/mountinfo").splitlines():
        own, _, system = line.partition(" - ")
        place, flags = own.split()[4:6]
        assert place not in found
        found[place] = (system.split()[0], set(flags.split(",")) - {"relatime"}, system.split()[2])
    plain, still = {"nosuid", "nodev"}, {"nosuid", "nodev", "noexec"}
    assert {place: (kind, flags) for place, (kind, flags, _) in found.items()} == {
        "/": ("overlay", {"ro", *plain}),
        "/proc": ("proc", {"rw", *still}),
        "/proc/interrupts": ("tmpfs", {"rw", "nosuid", "noexec"}),
        "/proc/fs": ("tmpfs", {"ro", *still}),
        "/proc/sys": ("proc", {"ro", *still}),
        "/proc/stat": ("proc", {"ro", *still}),
        "/dev": ("tmpfs", {"rw", "nosuid", "noexec"}),
        "/dev/pts": ("devpts", {"rw", "nosuid", "noexec"}),
        "/dev/shm": ("tmpfs", {"rw", *still}),
        "/tmp": ("tmpfs", {"rw", *plain}),
        "/work": ("tmpfs", {"rw", *plain}),
        "/data": ("tmpfs", {"rw", *plain}),
        "/in": ("erofs", {"ro", *plain}),
        "/out": ("overlay", {"rw", *plain}),
    }
    assert "size=1024k,nr_inodes=100" in found["/tmp"][2]
    assert "size=2048k,nr_inodes=50" in found["/work"][2]
    assert "size=1024k,nr_inodes=100" in found["/dev/shm"][2]


def test_nothing_of_the_initramfs(machine: Machine) -> None:
    """Init's files and directories are out of sight, the image's and our own are there."""
    names = set(machine.sh("ls -A /").split())
    assert names >= {
        "proc",
        "dev",
        "tmp",
        "work",
        "data",
        "in",
        "out",
        "etc",
        "usr",
        ".ringfence",
        "shortcut",
    }
    assert not names & {"init", "modules", "modules.list", "stage", "cgroup", "job"}
    assert (
        machine.sh("cat /etc/hosts /etc/hostname; readlink /shortcut")
        == "127.0.0.1 localhost\nguest-7\nusr/bin\n"
    )
    owned = machine.sh("stat -c '%a %u:%g' /tmp/below /work /data /etc/hosts /.ringfence").splitlines()
    assert owned == ["700 1:2", f"755 {UID}:{GID}", f"755 {UID}:{GID}", "644 0:0", "555 0:0"]


def test_device_nodes(machine: Machine) -> None:
    """There are the harmless devices, and no disk, port, console or memory."""
    found = machine.sh("cd /dev; for f in *; do stat -c '%n %a %t:%T %F' $f; done").splitlines()
    assert found == [
        "fd 777 0:0 symbolic link",
        "full 666 1:7 character special file",
        "null 666 1:3 character special file",
        "ptmx 777 0:0 symbolic link",
        "pts 755 0:0 directory",
        "random 666 1:8 character special file",
        "shm 1777 0:0 directory",
        "stderr 777 0:0 symbolic link",
        "stdin 777 0:0 symbolic link",
        "stdout 777 0:0 symbolic link",
        "tty 666 5:0 character special file",
        "urandom 666 1:9 character special file",
        "zero 666 1:5 character special file",
    ]


def test_kernel_is_set(machine: Machine) -> None:
    """Host name, kernel parameters and the loopback interface are as the text says."""
    assert (
        machine.sh("uname -n; cat /proc/sys/kernel/msgmax /proc/sys/net/ipv4/ip_default_ttl")
        == "guest-7\n4096\n33\n"
    )
    assert machine.sh("tail -n +3 /proc/net/dev | cut -d: -f1").split() == ["lo"]
    assert "127.0.0.1" in machine.sh("cat /proc/net/fib_trie")


def test_clock(machine: Machine) -> None:
    """The guest has the host's time, which no device told it."""
    before = time.time()
    told = int(machine.sh("date +%s"))
    assert before - 5 <= told <= time.time() + 5


def test_random_numbers(machine: Machine) -> None:
    """The kernel's generator has its seed before the first job runs."""
    found = machine.probe("random").out.strip()
    assert re.fullmatch(r"[0-9a-f]{32}", found), found


def test_only_its_own_processes(machine: Machine) -> None:
    """The job sees the agent as process 1 and the processes of jobs; no init, no thread of the kernel."""
    names = machine.sh("cat /proc/[0-9]*/comm").split()
    assert names[0] == ".ringfence"
    assert set(names[1:]) == {"cat", "sh"}


def test_what_is_refused(machine: Machine) -> None:
    """No way leads to the agent, the disks, the link, the console or the kernel's settings."""
    found = dict(line.split() for line in machine.probe("refused").out.splitlines())
    expected = {
        "mount": EPERM,
        "umount": EPERM,
        "mknod": EPERM,
        "sethostname": ENAMETOOLONG,  # by the filter
        "settime": EPERM,
        "reboot": EPERM,
        "klog": EPERM,
        "chroot": EPERM,
        "setuid": EPERM,
        "ptrace": EPERM,
        "agent-memory": EACCES,
        "agent-descriptors": EACCES,
        "kmsg": ENOENT,
        "port": ENOENT,
        "disk": ENOENT,
        "console": ENOENT,
        "write-device-directory": EACCES,
        "write-sysctl": EACCES,
        "write-agent": EROFS,
        "remove-agent": EROFS,
    }
    vsock = int(found.pop("vsock"))
    assert {name: int(error) for name, error in found.items()} == expected
    assert vsock != 0


def test_number_of_processes(machine: Machine) -> None:
    """The job's group has the limit of processes, agent and main job among them."""
    count, error = map(int, machine.probe("spawn").out.split())
    assert (count, error) == (20 - 3, EAGAIN)


def test_memory(machine: Machine) -> None:
    """What fits is given, what is beyond the limit is the end of the process that took it, and nobody else's."""
    assert machine.probe("eat", str(16 << 20)).out.split() == [str(16 << 20)]
    job = machine.probe("eat", str(96 << 20))
    assert job.code == 128 + 9
    assert job.flags & 4, "the guest says that memory was short"
    assert machine.sh("echo still here") == "still here\n"


def test_room_of_file_systems(machine: Machine) -> None:
    """A tmpfs ends at its size and its number of files; shares fill one and the same."""
    full = "dd if=/dev/zero of={} bs=64k count=64 2>/dev/null; stat -c %s {}; rm {}"
    assert int(machine.sh(full.format(*["/tmp/x"] * 3))) == 1 << 20
    script = (
        "dd if=/dev/zero of=/work/x bs=64k count=20 2>/dev/null; "
        + full.format(*["/data/y"] * 3)
        + "; rm /work/x"
    )
    assert int(machine.sh(script)) == (2 << 20) - 20 * (64 << 10)
    # A number of files: the directories of both shares, and the tmpfs's own, are three of them.
    script = "cd /work; i=0; while ( : >f$i ) 2>/dev/null; do i=$((i+1)); done; rm -f f*; echo $i"
    assert int(machine.sh(script)) == 50 - 3


def test_disks(machine: Machine) -> None:
    """A disk is read; changes to a writable one go to memory and end at its bound; a read-only one refuses."""
    assert machine.sh("cat /in/note /out/note; ls -nd /out | cut -d' ' -f1,3,4") == (
        f"from the host\nfrom the host\ndrwxr-x--x {UID} {GID}\n"
    )
    assert machine.run("sh", "-c", "echo x > /in/new").code == 2
    assert (
        machine.sh("echo changed >> /out/note; cat /out/note /in/note")
        == "from the host\nchanged\nfrom the host\n"
    )
    script = "dd if=/dev/zero of=/out/x bs=64k count=64 2>/dev/null; stat -c %s /out/x; rm /out/x"
    assert int(machine.sh(script)) < 1 << 20


def test_masked(machine: Machine) -> None:
    """Masked files are empty, masked directories too, read-only ones refuse even whom their mode would let."""
    assert machine.sh("cat /proc/interrupts; ls -A /proc/fs") == ""
    assert machine.run("sh", "-c", "echo 1 > /proc/sys/kernel/msgmax").code == 2


def test_report(machine: Machine) -> None:
    """A held job can be reported on: the agent inside reads its own /proc."""
    machine.send(OPEN, channel=2)
    job = machine.start("true", channel=2, flags=protocol.HOLD)
    machine.send(CONTROL, protocol.encode_report(), channel=2)
    kind, payload = machine.control(2)
    assert kind == protocol.REPORTED
    told = protocol.decode_reported(payload)
    assert told["hostname"] == "guest-7"
    assert told["no_new_privileges"] == "1"
    assert f"\nUid:\t{UID}" in told["status"]
    assert " /out " in told["mountinfo"]
    machine.send(END, channel=2, stream=0)
    machine.send(CONTROL, protocol.encode_go(), channel=2)
    while not job.over():
        machine._note(*machine.receive())
    machine.send(CLOSE, channel=2)
    assert job.code == 0


def test_no_terminals(machine: Machine) -> None:
    """The devpts is the job's own: nobody has a terminal in it yet."""
    assert machine.sh("ls /dev/pts") == "ptmx\n"


def test_root_that_can_be_written_to(kernel: Kernel, disk: Path) -> None:
    """With capabilities for chroot and uid 0 the job changes its root, up to the bound, and finds nothing outside."""
    made = Machine(kernel, drives(disk))
    try:
        release, boot_ms = made.hello()
        assert re.match(r"\d+\.\d+", release)
        assert 0 < boot_ms < BOOT_S * 1000
        chroot = 1 << 18
        steps = (
            "dir=/work:755:0:0",
            "dir=/in:755:0:0",
            "disk=vdb:erofs:/in:ro",
            "readonly=/proc/sys",
            "dir=/late:700:0:0",
        )
        changed = {
            "uid": "0",
            "gid": "0",
            "caps": f"{chroot:x}",
            "overlay": "4194304:200",
            "sysfs": "1",
            "memory": "max",
        }
        # The directory after the mounts lies in the root itself, which can be written to.
        assert made.set_up(text(*steps, **changed)) == (SETUP_DONE, b"")
        made.start("cat", channel=0)
        status = fields(made, "self")
        assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {f"{chroot:016x}"}
        found = dict(line.split() for line in made.probe("escape").out.splitlines())
        assert found == {
            "directory": "0",
            "chroot": "0",
            "out": "0",
            "init": str(ENOENT),
            "stage": str(ENOENT),
            "cgroup": str(ENOENT),
            "agent": "0",
        }
        assert made.sh("echo x > /usr/new; cat /usr/new; ls -d /late") == "x\n/late\n"
        job = made.run("dd", "if=/dev/zero", "of=/big", "bs=64k", "count=80")
        assert job.code == 1
        assert b"No space left" in job.streams[2]
        assert made.run("sh", "-c", "echo 1 > /proc/sys/kernel/msgmax").code == 2
        flags = made.sh("grep ' /sys ' /proc/self/mountinfo").split()[5].split(",")
        assert {"ro", "nosuid", "nodev", "noexec"} <= set(flags)
        # It may kill what it sees; init is not among that, and notices.
        made.send(CONTROL, protocol.encode_shutdown(), channel=0)
        made.send(POWEROFF)
        assert made.ended() == 0
    finally:
        made.close()


NO_END = struct.pack("<HBBI", 0x20, 0, 0, 0).hex()


@pytest.mark.parametrize(
    ("setup", "error", "words"),
    [
        (text(root="vdz:erofs"), ENOENT, b"root vdz"),
        (text(seccomp=NO_END), 22, b"seccomp"),
        (text("unknown=1"), 22, b"setup"),
        (text("sysctl=kernel.no_such_thing=1"), ENOENT, b"sysctl kernel.no_such_thing"),
        # /bin is a link in the image: a directory of ours there would hide all programs.
        (text("dir=/bin/x:755:0:0", "disk=vdb:erofs:/bin/x:ro"), 40, b"disk /bin/x"),
        (text("tmpfs=/nowhere:4096:1:755:0:0"), ENOENT, b"tmpfs /nowhere"),
    ],
)
def test_what_cannot_be_done(kernel: Kernel, disk: Path, setup: bytes, error: int, words: bytes) -> None:
    """A setup that fails, at whatever step, is told with its error, nothing runs, and the machine switches off."""
    made = Machine(kernel, drives(disk))
    try:
        made.hello()
        assert made.set_up(setup) == (SETUP_FAILED, struct.pack("<I", error) + words + b"\0")
        assert made.sock.recv(1) == b""
        assert made.ended() == 0
    finally:
        made.close()


def test_no_setup(kernel: Kernel, disk: Path) -> None:
    """What is no SETUP, where one is due, ends the machine without an answer."""
    made = Machine(kernel, drives(disk))
    try:
        made.hello()
        made.send(OPEN, channel=1)
        assert made.sock.recv(1) == b""
        assert made.ended() == 0
        assert b"init: setup" in made.console
    finally:
        made.close()
