"""`ringfence kernel`: real kernels boot and show what they are; building fails, stops and cleans up as it should."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from commands import RINGFENCE, refused, ringfence
from needs import COMPILERS
from ringfence.linux.paths import state_dir
from ringfence.runtime.initrd import initrd
from ringfence.runtime.microvm.kernel import kernel_name
from ringfence.runtime.microvm.kernels.store import Kernel, kernels

pytestmark = pytest.mark.requires("x86_64")

HERE = Path(__file__).parent
STATE = state_dir()  # before a test sets another
BOOT_S = 60


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The program that a guest runs, compiled."""
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs compiler: no C compiler")
    made = tmp_path_factory.mktemp("init") / "init"
    flags = ["-static", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, "-o", made, HERE / "kernel_init.c"], check=True)
    return made.read_bytes()


def boot(kernel: Kernel, init: bytes, place: Path) -> dict[str, str]:
    """Boot `kernel` under emulation with `init` as its first process, and return {name: value} that it said."""
    modules = [(os.path.basename(path), Path(path).read_bytes()) for path in kernel.modules]
    (place / "initrd").write_bytes(initrd(init, modules))
    machine = "microvm,isa-serial=off,rtc=off" + ("" if kernel.acpi else ",acpi=off")
    command = ["qemu-system-x86_64", "-M", machine, "-accel", "tcg", "-m", "256"]
    command += ["-cpu", "qemu64" if kernel.acpi else "qemu64,-tsc"]
    command += ["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"]
    command += ["-kernel", kernel.path, "-initrd", os.fspath(place / "initrd")]
    speed = "" if kernel.acpi else "lpj=100000"
    command += ["-append", f"reboot=t panic=-1 quiet {speed} {kernel.cmdline}"]
    command += ["-device", "virtio-serial-device", "-device", "virtconsole,chardev=said"]
    command += ["-chardev", f"file,id=said,path={place}/said"]
    command += ["-device", "virtio-rng-device"]
    subprocess.run(command, check=True, timeout=BOOT_S, stdin=subprocess.DEVNULL, capture_output=True)
    lines = (place / "said").read_text(errors="replace").splitlines()
    said = dict(line.strip().partition(" ")[::2] for line in lines)
    assert "end" in said, lines
    return said


def stored(kind: str) -> Kernel:
    """Return a kernel of this machine's store, or skip."""
    found = [kernel for kernel in kernels(STATE) if kernel.kind == kind]
    if not found:
        pytest.skip(
            f"needs kernel: no {kind} one: ringfence kernel {'build' if kind == 'built' else 'fetch'}"
        )
    return found[0]


@pytest.mark.requires("qemu", "kernel")
def test_the_default_kernel_boots_and_has_what_a_guest_needs(init: bytes, tmp_path: Path) -> None:
    """It says its release, has the drivers and file systems, makes process namespaces and control groups."""
    [kernel] = [one for one in kernels(STATE) if one.name == kernel_name(STATE)]
    said = boot(kernel, init, tmp_path)
    assert said["release"] == kernel.release
    assert {"erofs", "overlay", "tmpfs", "cgroup2"} <= set(said["filesystems"].split())
    assert said["virtio_blk"] == said["virtio_rng"] == "there"
    assert {"memory", "pids", "cpu", "io"} <= set(said["cgroup2-controllers"].split())
    assert said["pid-namespace"] == said["cgroup2"] == "0"


@pytest.mark.requires("qemu")
def test_a_built_kernel_is_hardened(init: bytes, tmp_path: Path) -> None:
    """In the guest: no module, kernel, eBPF, io_uring, userfaultfd or key can be loaded or made, root is locked out."""
    kernel = stored("built")
    said = boot(kernel, init, tmp_path)
    assert said["modules"] == "0"
    for call in ("finit_module", "kexec_load", "bpf", "io_uring_setup", "userfaultfd", "add_key"):
        assert int(said[call]) == errno.ENOSYS, call
    assert int(said["user-namespace"]) == errno.EINVAL
    assert "[integrity]" in said["lockdown"]
    assert said["oops"] == "1"
    for path in ("kcore", "kallsyms", "mem", "debugfs"):
        assert said[path] == "none", path


@pytest.mark.requires("qemu")
def test_a_fetched_kernel_loads_its_modules_in_order(init: bytes, tmp_path: Path) -> None:
    """Each of them, the first time: nothing that one needs comes after it."""
    kernel = stored("fetched")
    said = boot(kernel, init, tmp_path)
    assert int(said["modules"]) == len(kernel.modules) > 5
    assert {"erofs", "overlay"} <= set(said["filesystems"].split())


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    place = tmp_path / "state"
    monkeypatch.setenv("RINGFENCE_STATE_DIR", str(place))
    yield place
    left = [path.name for path in place.glob("kernels/*") if path.name.startswith(".")]
    left += [path.name for path in place.glob("kernels/.*")]
    assert left == []


def test_a_store_without_kernels(state: Path) -> None:
    """Listing shows none, choosing and removing says so in a line."""
    assert json.loads(ringfence("kernel", "ls", "--json").stdout) == []
    refused(ringfence("kernel", "use", "built"), 125, "no kernel 'built'", "ringfence kernel ls")
    refused(ringfence("kernel", "rm", "built"), 125, "no kernel 'built'", "[RF-HOST]")


@pytest.mark.requires("kernel")
def test_a_kernel_of_ones_own_from_file_to_removal(state: Path, tmp_path: Path) -> None:
    """Used by path, listed, chosen by the beginning of its name, removed; the file it came from stays."""
    mine = tmp_path / "vmlinux"
    shutil.copy(kernels(STATE)[0].path, mine)
    done = ringfence("kernel", "use", mine)
    assert done.returncode == 0, done.stderr
    name = done.stdout.decode().strip()
    assert re.fullmatch(r"own-.+-[0-9a-f]{12}", name)
    [facts] = json.loads(ringfence("kernel", "ls", "--json").stdout)
    assert (facts["name"], facts["default"], facts["source"]) == (name, True, str(mine))
    assert ringfence("kernel", "ls").stdout.splitlines()[1].split()[:3] == [b"*", name.encode(), b"own"]
    assert ringfence("kernel", "use", "own").stdout.decode().strip() == name
    assert ringfence("kernel", "rm", "own", "--json").returncode == 0
    assert json.loads(ringfence("kernel", "ls", "--json").stdout) == []
    assert mine.exists()


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (("use", "/dev/zero"), 125, ("/dev/zero is not a regular file", "vmlinux")),
        (("use", "/nowhere/vmlinux"), 125, ("/nowhere/vmlinux", "No such file")),
        (("use", "/bin/true"), 125, ("/bin/true is not a kernel",)),
        (("use", "x", "--cmdline", "y"), 2, ("--cmdline is for a FILE",)),
        (("build", "--jobs", "-1"), 2, ("--jobs -1",)),
        (
            ("build", "--source", "/nowhere/linux-6.1.tar.xz"),
            125,
            ("there is no file /nowhere/linux-6.1.tar.xz",),
        ),
        (("build", "--source", "/bin/true"), 125, ("does not say which version", "linux-6.1.tar.xz")),
    ],
)
def test_bad_input_is_one_line(
    state: Path, words: tuple[str, ...], status: int, parts: tuple[str, ...]
) -> None:
    """With the value that is wrong and what to do."""
    refused(ringfence("kernel", *words), status, *parts)


@pytest.mark.requires("root")
def test_without_apt_lists_fetching_says_what_to_run(state: Path) -> None:
    """On a fresh machine apt knows no package: one line that names it and the command."""
    hidden = "mount -t tmpfs none /var/lib/apt/lists; mount -t tmpfs none /var/cache/apt; mount -t tmpfs none /boot"
    done = ringfence("kernel", "fetch", mounts=hidden)
    refused(done, 125, "apt does not know the package linux-image-cloud-amd64", "apt-get update")


# Make cannot tell this from a kernel's source: what it is asked to do, it does, until it comes to the compiler.
MAKEFILE = r"""
tinyconfig:
	echo 'CONFIG_A=y' > .config
olddefconfig:
	sort -u .config -o .config
vmlinux:
	@echo "  CC      one.o"
	@touch $(MARK)
	$(COMPILE)
"""


def source(tmp_path: Path, compile_: str) -> Path:
    """Pack a source tree that takes every option and "compiles" by the shell command `compile_`."""
    tree = tmp_path / "linux-6.1"
    tree.mkdir()
    text = MAKEFILE.replace("$(COMPILE)", compile_).replace("$(MARK)", str(tmp_path / "compiling"))
    (tree / "Makefile").write_text(text)
    path = tmp_path / "linux-6.1.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        archive.add(tree, "linux-6.1")
    return path


needs_make = pytest.mark.skipif(
    not all(map(shutil.which, ("make", "gcc", "bc", "bison", "flex")))
    or not Path("/usr/include/gelf.h").exists(),
    reason="needs the packages for building kernels",
)


@needs_make
def test_a_failed_compilation_shows_its_last_words_and_keeps_the_log(state: Path, tmp_path: Path) -> None:
    """The error is one line, before it what was said last; the tree is gone, the log stays."""
    tar = source(tmp_path, "@echo 'one.c:1: error: no such thing'; exit 3")
    done = ringfence("kernel", "build", "--source", tar)
    said = done.stderr.decode().splitlines()
    assert done.returncode == 125
    assert done.stdout == b""
    assert "kernel: one.c:1: error: no such thing" in said
    assert said[-1].startswith("ringfence: make ended with status 2")
    log = state / "kernels/build.log"
    assert str(log) in said[-1]
    assert "no such thing" in log.read_text()


@needs_make
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(state: Path, tmp_path: Path, how: signal.Signals) -> None:
    """Compilers of a make that ignores the signal are gone, and the tree is; the status is that of Ctrl-C."""
    tar = source(
        tmp_path, "trap '' INT TERM; echo $$$$ > " + str(tmp_path / "pid") + "; sleep 300; sleep 300"
    )
    process = subprocess.Popen(
        [RINGFENCE, "kernel", "build", "--source", tar], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(how)
    said = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 130, said
    assert "interrupted: no kernel was added" in said
    shell = Path("/proc", (tmp_path / "pid").read_text().strip())
    wait_for(lambda: not shell.exists())


@needs_make
def test_a_killed_build_takes_its_compilers_along_and_its_rests_go_later(state: Path, tmp_path: Path) -> None:
    """kill -9 of the command ends make and what it runs; the next command that makes a kernel removes the tree."""
    tar = source(tmp_path, "echo $$$$ > " + str(tmp_path / "pid") + "; exec sleep 300")
    process = subprocess.Popen([RINGFENCE, "kernel", "build", "--source", tar], stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    assert list(state.glob("kernels/.new-*"))
    compiler = Path("/proc", (tmp_path / "pid").read_text().strip())
    wait_for(lambda: not compiler.exists())
    shutil.rmtree(tmp_path / "linux-6.1")
    assert ringfence("kernel", "build", "--source", source(tmp_path, "@exit 1")).returncode == 125


@needs_make
def test_an_option_that_does_not_take_effect_is_named(state: Path, tmp_path: Path) -> None:
    """It is seen before anything is compiled, whoever has asked for it."""
    tar = source(tmp_path, "@exit 1")
    tree = tmp_path / "linux-6.1"
    makefile = (tree / "Makefile").read_text()
    (tree / "Makefile").write_text(makefile.replace("sort -u", "sed -i /CONFIG_MINE=/d .config; sort -u"))
    with tarfile.open(tar, "w:xz") as archive:
        archive.add(tree, "linux-6.1")
    (tmp_path / "more").write_text("CONFIG_MINE=y\n")
    done = ringfence("kernel", "build", "-q", "--source", tar, "--config", tmp_path / "more")
    refused(done, 125, "do not take effect", "CONFIG_MINE=y")
    assert not (tmp_path / "compiling").exists()
    (tmp_path / "more").write_text("CONFIG_MINE=m\n")
    done = ringfence("kernel", "build", "-q", "--source", tar, "--config", tmp_path / "more")
    refused(done, 125, f"{tmp_path}/more:1", "is no option of a kernel")


def wait_for(true: Callable[[], object], patience_s: float = 20) -> None:
    """Wait until `true()` is."""
    deadline = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
