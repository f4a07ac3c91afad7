"""What goes wrong at the microVM tier: each fault is a line with what to do, and leaves nothing."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ringfence
from boxes import Sandboxes
from commands import RINGFENCE, Done, refused, remains, run
from detached import command_of, processes, until
from ringfence.host.detect import detect
from ringfence.runtime.microvm.kernel import find_kernel, kernel_name

pytestmark = pytest.mark.requires("root", "crun", "qemu", "kernel", "mkfs.erofs", "image:base", "userns")

TIER = ("--isolation", "microvm", "--allow-emulation")
STATE = "/var/lib/ringfence"


@pytest.fixture(autouse=True)
def nothing_of_this_test_left(home: Path) -> Iterator[None]:
    """After each test no sandbox, id range or mount of it is there, at once and without a ``gc``."""
    yield
    assert remains(home) == []


def microvm(*words: str | Path, **more: object) -> Done:
    return run(*TIER, *words, **more)


def kvm_works() -> bool:
    return detect().kvm == "works"


# What a policy asks and a machine has not


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--network", "egress"], "RF-UNENFORCEABLE", "network.mode cannot be enforced at the microvm tier"),
        (["--publish", "8080:80"], "RF-UNENFORCEABLE", "network.publish"),
        (["--device", "/dev/fuse"], "RF-UNENFORCEABLE", "/dev/fuse cannot be passed into a microVM"),
        (["--set", "lsm=required"], "RF-UNENFORCEABLE", "lsm cannot be enforced"),
        (["--set", "limits.swap=1MiB"], "RF-UNENFORCEABLE", "a microVM has no swap"),
        (["--gvisor-platform", "kvm"], "RF-HOST", "the microvm tier has no platform 'kvm'"),
        (["--image", "host"], "RF-MOUNT", "cannot be the image of a microVM"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused(words: list[str], code: str, part: str) -> None:
    """125, one line, the field by name."""
    refused(microvm(*words, "true"), 125, f"[{code}]", part)


def test_without_kvm_and_leave_to_emulate_nothing_is_run() -> None:
    """The reason and both ways on; never an emulated machine, or another tier, unasked."""
    if kvm_works():
        pytest.skip("KVM works here")
    done = run("-i", "microvm", "--", "echo", "ran")
    refused(
        done, 125, "the microvm tier needs KVM, which does not work here: ", "--allow-emulation", "[RF-HOST]"
    )
    with pytest.raises(ringfence.RingfenceError) as error:
        ringfence.run(["true"], isolation="microvm")
    assert error.value.code == "RF-HOST"


def test_a_sysctl_that_the_guest_has_not(tmp_path: Path) -> None:
    """The guest says which parameter it has not; nothing has run."""
    del tmp_path
    done = microvm("--sysctl", "net.ipv4.ip_unprivileged_port_start=80", "--", "echo", "up")
    assert (done.returncode, done.stdout) == (0, b"up\n"), done.stderr
    done = microvm("--sysctl", "fs.mqueue.nosuch=1", "--", "echo", "up")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (125, b"", 1)
    assert b"fs.mqueue.nosuch" in done.stderr


# QEMU and mkfs.erofs


def hidden(name: str) -> tuple[str, dict[str, str]]:
    """Return a script that puts /dev/null over every program `name`, with its environment."""
    script = f"for place in $PLACES; do if [ -e $place/{name} ]; then mount --bind /dev/null $place/{name}; fi; done"
    return script, {"PLACES": f"{os.environ['PATH'].replace(':', ' ')} /usr/sbin /sbin /usr/local/bin"}


def test_no_qemu() -> None:
    """How to get it."""
    script, env = hidden("qemu-system-x86_64")
    done = microvm("true", mounts=script, env=env)
    refused(done, 125, "QEMU is not installed", "apt-get install", "[RF-HOST]")


def test_no_mkfs(shared: Path) -> None:
    """Only who mounts something needs it, and is told so."""
    script, env = hidden("mkfs.erofs")
    done = microvm("-v", f"{shared}:/data", "--", "true", mounts=script, env=env)
    refused(done, 125, f"cannot copy '{shared}' for the microVM", "erofs-utils", "[RF-MOUNT]")


def test_a_source_that_is_gone_since_the_plan(machines: Sandboxes, shared: Path) -> None:
    """What became a link is not followed, what is gone is said to be."""
    (shared / "source").mkdir()
    mount = {"source": str(shared / "source"), "target": "/data"}
    fields = {"filesystem.mounts": [mount]}
    call = {"isolation": "microvm", "allow_emulation": True, "overrides": fields, "timeout": 60}
    assert ringfence.run(["ls", "/data"], **call).exit_status == 0  # type: ignore[arg-type]
    (shared / "source").rmdir()
    (shared / "source").symlink_to("/etc")
    with pytest.raises(ringfence.RingfenceError) as error:
        ringfence.run(["ls", "/data"], **call)  # type: ignore[arg-type]
    assert error.value.code in ("RF-MOUNT", "RF-POLICY")
    del machines


def test_no_room_for_a_copy(shared: Path) -> None:
    """A run directory that is full is said to be, and nothing of the copy is left."""
    with open(shared / "large", "wb") as file:
        file.truncate(64 << 20)
    (shared / "large").write_bytes(os.urandom(64 << 20))
    script = 'mount -t tmpfs -o size=8m,mode=711 tmpfs "$RINGFENCE_RUN_DIR"'
    done = microvm("-v", f"{shared}:/data", "--", "true", mounts=script)
    refused(done, 125, f"cannot copy '{shared}'", "room in the run directory")


# The kernel: a store of our own in place of the machine's


class Kernels:
    """A directory of kernels that takes the place of the store's in a mount namespace."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        true = kernel_name(STATE)
        # Another name: plans are kept by it.
        self.name = f"{true[:-8]}{os.urandom(4).hex()}"
        shutil.copytree(f"{STATE}/kernels/{true}", directory / self.name)
        (directory / "default").symlink_to(self.name)
        self.path = directory / self.name / os.path.basename(find_kernel(STATE).path)

    def run(self, *words: str, **more: object) -> Done:
        script = f"mount --bind {self.directory} {STATE}/kernels"
        return run(*TIER, *words, mounts=script, **more)


@pytest.fixture
def kernels(tmp_path: Path) -> Kernels:
    return Kernels(tmp_path)


def test_no_kernel(tmp_path: Path) -> None:
    """How to get one."""
    done = run(*TIER, "true", mounts=f"mount --bind {tmp_path} {STATE}/kernels")
    refused(done, 125, "no kernel for virtual machines is here", "ringfence kernel fetch", "[RF-HOST]")


def test_the_same_kernel_in_another_store_boots(kernels: Kernels) -> None:
    """The control of what follows."""
    done = kernels.run("echo", "up")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"up\n", b"")


def broken(how: str, path: Path) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another program":
        path.write_bytes(Path("/bin/true").read_bytes())
    elif how == "text":
        path.write_text("#!/bin/sh\n")


@pytest.mark.parametrize("how", ["truncated", "empty", "another program", "text"])
def test_a_kernel_that_is_none(kernels: Kernels, how: str) -> None:
    """A kernel that was damaged does not boot: 125, one line with what is known, and nothing hangs."""
    broken(how, kernels.path)
    started = time.monotonic()
    done = kernels.run("echo", "up", timeout=100)
    assert (done.returncode, done.stdout) == (125, b""), done.stderr
    assert done.stderr.startswith(b"ringfence: ")
    assert done.stderr.count(b"\n") == 1
    assert time.monotonic() - started < 60


def test_a_kernel_that_panics(kernels: Kernels) -> None:
    """The last lines of its console say why: here it is told to run an init that is not there."""
    record = next(path for path in (kernels.directory / kernels.name).iterdir() if path.suffix == ".json")
    facts = json.loads(record.read_text())
    key = next(name for name in facts if "cmdline" in name or "command" in name)
    # With a delay: what is said before there is a console nobody hears.
    facts[key] = f"{facts[key]} rdinit=/nonexistent root=/dev/nothing rootdelay=2"
    record.write_text(json.dumps(facts))
    done = kernels.run("echo", "up")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (125, b"", 1)
    assert b"the microVM could not start the sandbox: " in done.stderr
    assert b"Kernel panic" in done.stderr


# While a job runs


def started(*words: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [RINGFENCE, "run", *TIER, *words, "--", "sh", "-c", "echo ready; while :; do sleep 0.1; done"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n", process.communicate()
    return process


def vmm(home: Path) -> int:
    (sandbox,) = os.listdir(home / "sandboxes")
    (pid,) = [pid for pid in processes(sandbox) if b"qemu" in command_of(pid).split(b"\0")[0]]
    return pid


def test_a_vmm_that_is_killed(home: Path) -> None:
    """137, and that the machine is gone."""
    process = started()
    os.kill(vmm(home), signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 137
    assert said.decode().startswith("ringfence: the microVM ")


def test_a_vmm_that_crashes(home: Path) -> None:
    """A fault of QEMU's own is the end of the machine alone."""
    process = started()
    os.kill(vmm(home), signal.SIGSEGV)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 137
    assert said.decode().startswith("ringfence: the microVM ")


def test_a_machine_that_hangs(home: Path) -> None:
    """A stopped machine keeps nobody waiting beyond the time limit, and goes with its sandbox."""
    process = started("--timeout", "3s")
    pid = vmm(home)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 124
    assert b"time limit of 3 s reached" in said
    assert time.monotonic() - began < 15
    until(lambda: not command_of(pid))
