"""Machines restored from a saved one: made once, never shared, in time, and refused when the file was touched.

All machines here have a size that nobody else asks for, so that their snapshot is these tests' own.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import refused, run
from detached import CLI, Cli, processes, until
from ringfence.linux.paths import state_dir
from ringfence.plan.document import Machine
from ringfence.runtime.microvm import saving, snapshots
from ringfence.sandbox.prepare import Request, plan_for

pytestmark = pytest.mark.requires(
    "root", "crun", "qemu", "kernel", "mkfs.erofs", "image:base", "userns", "x86_64"
)

MEMORY = "207MiB"
TIER = ("--isolation", "microvm", "--allow-emulation", "--memory", MEMORY)
WHO = """
import json, os, socket, time
def read(path):
    with open(path, 'rb') as file: return file.read(64).hex()
print(json.dumps({
    'getrandom': os.getrandom(32).hex(),
    'urandom': read('/dev/urandom'),
    'hwrandom': read('/proc/sys/kernel/random/uuid'),
    'boot': read('/proc/sys/kernel/random/boot_id'),
    'host': socket.gethostname(),
    'hash': hash('the seed of a process'),
    'auxv': read('/proc/self/stat') and os.getrandom(8).hex(),
    'address': id(object()),
}), flush=True)
"""
CLOCK = """
import sys, time
print(flush=True)
sys.stdin.readline()
print(time.time(), flush=True)
before = time.monotonic()
time.sleep(1)
print(time.monotonic() - before, flush=True)
"""


class Snapshot:
    """The snapshot of this file's machines."""

    def __init__(self) -> None:
        request = Request(overrides={"isolation": "microvm", "limits.memory": MEMORY}, allow_emulation=True)
        plan = plan_for(request)
        assert plan["machine"] is not None
        self.state = state_dir()
        self.name = snapshots.key(plan, plan["machine"])
        self.home = Path(snapshots.snapshots_dir(self.state))

    def file(self, end: str) -> Path:
        return self.home / f"{self.name}.{end}"

    def there(self) -> bool:
        return self.file("record").exists() and self.file("state").exists()

    def drop(self) -> None:
        snapshots.drop(self.state, self.name)
        self.file("failed").unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the one who makes snapshots, as soon as nobody else is."""
        with contextlib.ExitStack() as stack:
            until(lambda: stack.enter_context(saving.making(self.state, "of-a-test")), 60)
            yield


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Snapshot]:
    """There is none in the beginning, nor afterwards."""
    found = Snapshot()
    found.drop()
    yield found
    found.drop()


@pytest.fixture
def none(snapshot: Snapshot) -> Snapshot:
    """There is no snapshot, and nobody else is making one."""
    snapshot.drop()
    with snapshot.alone():
        return snapshot


@pytest.fixture
def saved(snapshot: Snapshot) -> Snapshot:
    """There is a snapshot."""
    for _ in range(3):  # somebody else may be making another one at this moment
        if not snapshot.there():
            snapshot.file("failed").unlink(missing_ok=True)
            _run("true")
    assert snapshot.there(), snapshot.file("failed").read_text() if snapshot.file("failed").exists() else ""
    return snapshot


def _run(
    *command: str, options: tuple[str, ...] = (), status: int = 0
) -> "subprocess.CompletedProcess[bytes]":
    done = run(*TIER, *options, "--", *command, timeout=90)
    assert done.returncode == status, done.stderr.decode()
    return done


def _start(*command: str) -> "subprocess.Popen[bytes]":
    words = [*CLI, "run", *TIER, "--interactive", "--", *command]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _facts(snapshot: Snapshot) -> dict[str, str]:
    with open(snapshot.file("state"), "rb") as file:
        return {**snapshots.file_facts(file.fileno()), "digest": snapshots.digest(file.fileno())}


def test_the_first_run_saves_and_the_others_are_restored(none: Snapshot, microvm: Cli) -> None:
    """One file for all of them, which none of them writes to, and less time than a boot takes."""
    _run("true")
    assert none.there()
    before = _facts(none)
    times: dict[str, list[float]] = {"": [], "--no-snapshot": []}
    for option in ("", "--no-snapshot") * 2:
        began = time.monotonic()
        assert _run("echo", "here", options=tuple(filter(None, [option]))).stdout == b"here\n"
        times[option].append(time.monotonic() - began)
    assert min(times[""]) < min(times["--no-snapshot"]) * 0.7, times
    assert _facts(none) == before


def test_two_machines_of_one_snapshot_share_no_secret(saved: Snapshot, microvm: Cli) -> None:
    """Random numbers, boot id, host name and the seeds of processes are each machine's own."""
    both = [_start("python3", "-c", WHO) for _ in range(2)]
    said = []
    for process in both:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err.decode()
        said.append(json.loads(out))
    one, other = said
    assert {name for name in one if one[name] == other[name]} == set()


def test_the_clock_is_right_and_timers_run(saved: Snapshot, microvm: Cli) -> None:
    """However old the snapshot is, the guest's clock is the host's, and a second takes a second.

    Where the machine is emulated its clock counts ticks, and loses those that a busy host does not let it have.
    """
    lost = 1.0 if _emulated() else 0.1
    made = saved.file("state").stat().st_mtime
    until(lambda: time.time() > made + 3 * lost)
    process = _start("python3", "-c", CLOCK)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"\n"
        asked = time.time()
        process.stdin.write(b"\n")
        process.stdin.flush()
        told = float(process.stdout.readline())
        answered = time.time()
        began = time.monotonic()
        slept = float(process.stdout.readline())
        took = time.monotonic() - began
    finally:
        process.kill()
        _, err = process.communicate()
    assert asked - lost <= told <= answered + 0.1, err.decode()
    assert 1.0 <= slept < 1.5
    assert 0.8 <= took < 3.0


def test_the_ring_around_a_restored_machine_has_no_way_to_the_file(saved: Snapshot, microvm: Cli) -> None:
    """The VMM has read it and closed it; nobody else in the ring has it, and its proof is that of any machine."""
    sandbox = (
        microvm.run("-d", "--allow-emulation", "--memory", MEMORY, "--", "sleep", "60")
        .stdout.decode()
        .strip()
    )
    state = os.stat(saved.file("state"))
    open_files = [entry for pid in processes(sandbox) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    assert len(open_files) > 10
    for entry in open_files:
        with contextlib.suppress(FileNotFoundError):
            found = entry.stat()
            assert (found.st_dev, found.st_ino) != (state.st_dev, state.st_ino), entry
    commandline = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes(sandbox)]
    assert any(b"-incoming" in words for words in commandline), "it was restored indeed"


@pytest.mark.parametrize("damage", ["truncated", "changed", "of another version"])
def test_a_touched_snapshot_is_refused_and_the_next_run_makes_another(
    saved: Snapshot, microvm: Cli, damage: str
) -> None:
    """One line, exit 125, nothing run; then it is gone."""
    if damage == "truncated":
        os.truncate(saved.file("state"), 1 << 20)
    elif damage == "changed":
        with open(saved.file("state"), "r+b") as file:
            file.seek(5 << 20)
            file.write(b"poison")
    else:
        record = snapshots.read_record(saved.state, saved.name) or {}
        snapshots.write_record(saved.state, saved.name, {**record, "vmm": "QEMU emulator version 9.9"})
    refused(run(*TIER, "--", "echo", "ran"), 125, "the snapshot", "--no-snapshot")
    assert not saved.file("state").exists()
    assert _run("echo", "ran").stdout == b"ran\n"


def test_what_qemu_cannot_load_is_refused_and_removed(saved: Snapshot, microvm: Cli) -> None:
    """Also where the record says that all is well: the machine does not come up half."""
    with open(saved.file("state"), "r+b") as file:
        file.write(b"nothing that QEMU knows")
        facts = snapshots.file_facts(file.fileno())
    with open(saved.file("state"), "rb") as file:
        facts = snapshots.file_facts(file.fileno())
    record = snapshots.read_record(saved.state, saved.name) or {}
    snapshots.write_record(saved.state, saved.name, {**record, **facts})
    refused(run(*TIER, "--", "echo", "ran"), 125, "the microVM could not start", "migration")
    assert not saved.file("state").exists()


def test_a_machine_that_is_not_to_be_restored_boots(none: Snapshot, microvm: Cli) -> None:
    """With --no-snapshot, and while another one is being saved: neither waits, neither makes one."""
    assert _run("echo", "booted", options=("--no-snapshot",)).stdout == b"booted\n"
    assert not none.there()
    with none.alone():
        assert _run("echo", "booted").stdout == b"booted\n"
    assert not none.there()


def test_a_failure_to_save_is_no_failure_to_run(none: Snapshot, microvm: Cli) -> None:
    """Without room in the state directory for a machine the run boots."""
    home = none.home
    script = f"mount -t tmpfs -o size=1m tmpfs {home}"
    done = run(*TIER, "--", "echo", "booted", mounts=script, timeout=90)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"booted\n", b"")
    assert not none.there()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_who_gives_up_while_a_machine_is_saved_leaves_nothing(
    none: Snapshot, microvm: Cli, number: signal.Signals, status: int
) -> None:
    """The machine ends with us, however we end; no half snapshot is used by anybody."""
    process = _saving(none, microvm)
    microvm.look()
    process.send_signal(number)
    assert process.wait(30) == status
    assert process.stderr is not None
    assert process.stderr.read() == b""
    until(lambda: not any(_vmms()))
    assert not none.there()


def _saving(none: Snapshot, microvm: Cli) -> "subprocess.Popen[bytes]":
    """Start a run that saves a machine, and return it at that."""
    for _ in range(5):
        none.drop()
        process = microvm.start("run", *TIER, "--", "true", stderr=subprocess.PIPE)
        while process.poll() is None:
            if none.file("new").exists() and any(_vmms()):
                return process
            time.sleep(0.02)
        # Somebody else was saving one at this moment, so that ours booted.
    pytest.fail(f"no machine is saved: {process.communicate()}")


def _vmms() -> list[str]:
    """Return the command lines of VMMs that have the size of ours."""
    found, size = [], b"\0-m\0" + _size()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes()
            if b"qemu-system" in words and size in words:
                found.append(words.decode(errors="replace"))
    return found


def _machine() -> Machine:
    overrides = {"isolation": "microvm", "limits.memory": MEMORY}
    machine = plan_for(Request(overrides=overrides, allow_emulation=True))["machine"]
    assert machine is not None
    return machine


def _emulated() -> bool:
    return _machine()["accelerator"] == "tcg"


def _size() -> bytes:
    return f"{_machine()['memory_bytes'] >> 20}M\0".encode()
