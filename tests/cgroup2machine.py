"""A virtual machine whose kernel has cgroup v2 alone, for tests of the linux tier on hosts that have not.

Its kernel and its system are Debian's own packages, bootstrapped once and kept in a cache directory; this checkout,
with its environment, is a second disk of each run. `main` runs pytest in it and prints what that prints.
"""

import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from needs import COMPILERS
from ringfence.host.detect import detect
from ringfence.image import store
from ringfence.image.bootstrap import bootstrap
from ringfence.image.sources import host_suite
from ringfence.runtime.initrd import initrd
from ringfence.runtime.microvm.kernels import bzimage
from ringfence.runtime.microvm.kernels.clock import tsc_khz
from ringfence.runtime.microvm.kernels.modules import Tree

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "cgroup2"
QEMU = "qemu-system-x86_64"
PACKAGES = (
    *("crun", "e2fsprogs", "kmod", "libseccomp2", "linux-image-cloud-amd64"),
    *("musl-tools", "python3", "runc", "uidmap"),
)
# Loaded before there is a disk; all others the kernel finds on it.
MODULES = ("virtio_mmio", "virtio_console", "virtio_blk", "ext4", "crc32c_generic", "erofs")
# What of the checkout and its environment no test inside needs: most of it are tools for the checkout itself.
TOOLS = r"\.venv/lib/[^/]+/site-packages/(mypy.*|pip|jsonschema_rs|grimp|.*__mypyc\..*)"
LEFT_OUT = rf"^(\.git|agent/build|\.(mypy|ruff|pytest|import_linter)_cache|\.hypothesis|{TOOLS})(/|$)"
MEMORY_MIB = 2048
DISK_MIB = 3072
SLOW = 15  # so much slower than this one is an emulated machine, more or less
_STATUS = re.compile(rb"^machine: status (\d+)\r?$", re.M)
# In namespaces that end with it: the system with the state of its Ringfence in place, copied into the image of a disk.
_FILL = """
mkdir /tmp/fill && mount -t tmpfs none /tmp/fill && cd /tmp/fill && mkdir upper work root
mount -t overlay -o "lowerdir=$SYSTEM,upperdir=upper,workdir=work" none root
mkdir -p root/var/lib/ringfence && mount --bind "$STATE" root/var/lib/ringfence
mkfs.ext4 -q -F -E root_owner=0:0 -d root "$DISK"
"""


class Disks:
    """What the machine boots from: `kernel`, `initrd` and `system`, all in the cache directory."""

    def __init__(self, directory: Path) -> None:
        self.kernel = directory / "vmlinux"
        self.initrd = directory / "initrd"
        self.system = directory / "system.ext4"


def lack() -> str:
    """Return why the machine cannot be had here, "" when it can."""
    for program in (QEMU, "mkfs.ext4", "mkfs.erofs", "mmdebstrap"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if os.geteuid() != 0:
        return "not run as root"
    if (Path(sys.executable).resolve().parent) != Path("/usr/bin"):
        return f"the environment's Python is {Path(sys.executable).resolve()}, not Debian's"
    return ""


def cache_dir() -> Path:
    """Return where what takes long to make is kept between runs."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "ringfence" / "cgroup2"


def prepare(say: Callable[[str], None]) -> Disks:
    """Return the disks of the machine; made now, in a minute or two, where the cache has none for these packages."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _prepared(cache, say)


def _prepared(cache: Path, say: Callable[[str], None]) -> Disks:
    suite = host_suite(Path("/etc/os-release").read_text())
    states = {name: cache / name for name in ("system", "state")}
    for state in states.values():
        state.mkdir(mode=0o711, exist_ok=True)
    system, _ = bootstrap(
        str(states["system"]), f"debian:{suite}", name=f"debian:{suite}", include=PACKAGES, say=say
    )
    base, _ = bootstrap(str(states["state"]), "base", name="base:latest", suite=suite, say=say)
    sources = [HERE / "init.c", Path(__file__)]
    parts = [system.digest, base.digest, *(path.read_text() for path in sources)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    made = cache / f"disks-{key}"
    if not made.is_dir():
        say("making the machine's disk")
        with tempfile.TemporaryDirectory(prefix="disks-", dir=cache) as work:
            tree = Path(store.layer_path(str(states["system"]), system.layers[0].diff_id), "fs")
            _make(Disks(Path(work)), tree, states["state"])
            for old in cache.glob("disks-????????????????"):
                shutil.rmtree(old)
            os.rename(work, made)
            Path(work).mkdir()  # for the end of the block
    return Disks(made)


def _make(disks: Disks, tree: Path, state: Path) -> None:
    (packed,) = tree.glob("boot/vmlinuz-*")
    disks.kernel.write_bytes(bzimage.unpack(packed.read_bytes(), str(packed)))
    release = packed.name.removeprefix("vmlinuz-")
    modules = Tree(str(tree / "lib/modules" / release))
    order = modules.order(MODULES)
    init = disks.initrd.with_name("init")
    compiler = next(name for name in COMPILERS if shutil.which(name))
    subprocess.run(
        [compiler, "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o", init, HERE / "init.c"], check=True
    )
    disks.initrd.write_bytes(
        initrd(init.read_bytes(), [(f"{name}.ko", modules.content(name)) for name in order])
    )
    disks.system.touch(mode=0o600)
    os.truncate(disks.system, DISK_MIB << 20)
    places = {"SYSTEM": str(tree), "STATE": str(state), "DISK": str(disks.system)}
    apart = ["unshare", "--mount", "--propagation=private", "sh", "-euc"]
    script = f"mount -t tmpfs none /tmp\n{_FILL}"
    subprocess.run([*apart, script], env={**os.environ, **places}, check=True)


def run(words: str, *, timeout_s: float, say: Callable[[str], None], out: Callable[[bytes], object]) -> int:
    """Run the shell script `words` in the machine, in this checkout's place; return its status, 255 if none came.

    `out` is given what the machine writes, as it comes; after `timeout_s` seconds the machine is switched off.
    """
    disks = prepare(say)
    with tempfile.TemporaryDirectory(prefix="ringfence-cgroup2-") as work:
        source, script = Path(work, "source.erofs"), Path(work, "words")
        packer = ["mkfs.erofs", "--quiet", f"--exclude-regex={LEFT_OUT}", source, ROOT]
        subprocess.run(packer, check=True, stdout=subprocess.DEVNULL)
        text = words.encode() + b"\n"
        script.write_bytes(text + bytes(-len(text) % 512))
        return _boot(disks, source, script, timeout_s, out)


def _boot(disks: Disks, source: Path, script: Path, timeout_s: float, out: Callable[[bytes], object]) -> int:
    command = _command(disks, source, script)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    watch = threading.Timer(timeout_s, process.kill)
    watch.start()
    said = b""
    try:
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            said = (said + piece)[-4096:]
            out(piece)
    finally:
        watch.cancel()
        process.kill()
        process.communicate()
    found = _STATUS.findall(said)
    return int(found[-1]) if found else 255


def _command(disks: Disks, source: Path, script: Path) -> list[str | Path]:
    works = detect().kvm == "works"
    khz = tsc_khz()
    words = "reboot=t panic=-1 quiet console=hvc0" + (f" tsc_early_khz={khz}" if khz and not works else "")
    # Gone with us, however we end.
    command: list[str | Path] = [
        "setpriv",
        "--pdeathsig=KILL",
        QEMU,
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        "-no-reboot",
    ]
    command += ["-M", "microvm,isa-serial=off", "-accel", "kvm" if works else "tcg,thread=multi"]
    command += ["-cpu", "host" if works else "max", "-smp", "2", "-m", f"{MEMORY_MIB}M"]
    command += ["-kernel", disks.kernel, "-initrd", disks.initrd, "-append", words]
    command += ["-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng"]
    command += ["-chardev", "stdio,id=console,signal=off", "-device", "virtio-serial-device"]
    command += ["-device", "virtconsole,chardev=console"]
    # What is written to the system's disk goes with the machine.
    for number, (path, how) in enumerate(
        ((disks.system, "snapshot=on"), (source, "readonly=on"), (script, "readonly=on"))
    ):
        command += ["-drive", f"if=none,id=d{number},file={path},format=raw,{how}"]
        command += ["-device", f"virtio-blk-device,drive=d{number}"]
    return command


def pytest_words(arguments: Sequence[str]) -> str:
    """Return the script that runs pytest with `arguments` in the machine, on the checkout in its own place."""
    root = shlex.quote(str(ROOT))
    words = ["-p", "no:cacheprovider", f"--timeout={120 * SLOW}", "--color=no", *arguments]
    return f"""
mkdir -p {root}
mount --bind /.source {root}
cd {root}
export PYTHONDONTWRITEBYTECODE=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis RINGFENCE_TEST_SLOW={SLOW}
exec .venv/bin/python -m pytest {shlex.join(words)} 2>&1
"""


def main(arguments: Sequence[str]) -> int:
    """Run pytest with `arguments` in the machine."""
    reason = lack()
    if reason:
        print(f"test-cgroup2: {reason}", file=sys.stderr)
        return 2

    def out(piece: bytes) -> None:
        sys.stdout.buffer.write(piece.replace(b"\r\n", b"\n"))
        sys.stdout.buffer.flush()

    return run(
        pytest_words(arguments),
        timeout_s=3600,
        say=lambda text: print(f"test-cgroup2: {text}", file=sys.stderr),
        out=out,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
