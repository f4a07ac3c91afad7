"""The kernels below the state directory, each a directory that never changes once it has its name.

kernels/NAME/vmlinux        an uncompressed ELF file with a PVH entry
kernels/NAME/modules/       modules that a guest must load itself, when drivers are not built in
kernels/NAME/modules.list   their names in the order of loading
kernels/NAME/kernel.json    what it is and where it came from: Record
kernels/default             a symlink to the one that is taken when none is named
kernels/lock                held while one is made
kernels/.new-*              one that is being made, or a rest of that

NAME ends with a digest of all that a guest depends on, so the same name is the same kernel.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from contextlib import contextmanager

import msgspec

from ringfence.errors import HostError
from ringfence.runtime.microvm.kernel import DEFAULT, LOCK, default, is_name, kernels_dir, names
from ringfence.runtime.microvm.kernels.clock import tsc_khz

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUILT, FETCHED, OWN = "built", "fetched", "own"
# The kernel that people have built is the one they want; one of their own they choose themselves.
_RANK = {BUILT: 2, OWN: 1, FETCHED: 0}
_DIGITS = 12
_MOST_RECORD_BYTES = 1 << 20
_READABLE = 0o755


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What ``kernel.json`` says of a kernel. `source` and `config` tell how it was made, the rest how to boot it.

    `acpi`: it finds its devices by ACPI and not by its command line; `cmdline`: what it needs there besides.
    `modules` are file names in the order of loading; `extras` are those to load after them for one purpose ("vsock").
    """

    kind: str
    release: str
    source: str
    sha256: str
    digest: str = ""
    size_bytes: int
    acpi: bool = False
    cmdline: str = ""
    modules: tuple[str, ...] = ()
    extras: dict[str, tuple[str, ...]] = {}
    config: str = ""
    compiler: str = ""
    made_at: str = ""


class Kernel:
    """A kernel of the store: what to boot and how."""

    __slots__ = ("directory", "name", "record")

    def __init__(self, directory: str, record: Record) -> None:
        """Describe the kernel in `directory`."""
        self.directory = directory
        self.name = os.path.basename(directory)
        self.record = record

    @property
    def state(self) -> str:
        """The state directory that it is kept in."""
        return os.path.dirname(os.path.dirname(self.directory))

    @property
    def path(self) -> str:
        """The uncompressed kernel."""
        return os.path.join(self.directory, "vmlinux")

    @property
    def digest(self) -> str:
        """sha256:… of all that a guest depends on: kernel, modules, how it is started."""
        return self.record.digest

    @property
    def kind(self) -> str:
        """One of "built", "fetched", "own"."""
        return self.record.kind

    @property
    def release(self) -> str:
        """What ``uname -r`` says in the guest."""
        return self.record.release

    @property
    def acpi(self) -> bool:
        """Whether it finds devices and timers by ACPI only; then it also needs a CPU with a time stamp counter."""
        return self.record.acpi

    @property
    def cmdline(self) -> str:
        """What it needs on its command line, on this host, besides what every guest gets; "" for nothing."""
        khz = tsc_khz() if self.record.acpi else 0
        return " ".join(filter(None, (self.record.cmdline, f"tsc_early_khz={khz}" if khz else "")))

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that the guest must load, in this order."""
        return self._paths(self.record.modules)

    @property
    def vsock_modules(self) -> tuple[str, ...]:
        """Paths of the modules to load after `modules` when the link is a vsock."""
        return self._paths(self.record.extras.get("vsock", ()))

    def _paths(self, modules: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(os.path.join(self.directory, "modules", name) for name in modules)


def read(state: str, name: str) -> Kernel:
    """Return the kernel `name` of the state directory `state`; raises HostError when it cannot be read."""
    path = kernels_dir(state, name, "kernel.json")
    try:
        with open(path, "rb") as file:
            record = msgspec.json.decode(file.read(_MOST_RECORD_BYTES), type=Record)
    except OSError as error:
        raise cannot("read", path, error) from error
    except msgspec.DecodeError as error:
        raise HostError(f"{path}: {error}", hint=f"remove it with: ringfence kernel rm {name}") from error
    return Kernel(kernels_dir(state, name), record)


def kernels(state: str) -> list[Kernel]:
    """Return the kernels of `state`, the last made first; raises HostError."""
    return sorted((read(state, name) for name in names(state)), key=_made, reverse=True)


def _made(kernel: Kernel) -> str:
    return kernel.record.made_at


def by_source(state: str, kind: str, source: str, config: str = "", compiler: str = "") -> Kernel | None:
    """Return the kernel that was made of just this, None if there is none."""
    for kernel in kernels(state):
        record = kernel.record
        if (record.kind, record.source, record.config, record.compiler) == (kind, source, config, compiler):
            return kernel
    return None


@contextmanager
def making(
    state: str, waiting: "Callable[[], None]" = lambda: None, *, room_bytes: int = 0
) -> "Iterator[tuple[str, int]]":
    """Yield an empty directory to make a kernel in, and the descriptor of the lock that guards it.

    One at a time; `waiting` is called once when another is at work. A child that inherits the descriptor keeps others
    away until it is gone too. The directory and rests of earlier ones are removed. Raises HostError.
    """
    home = kernels_dir(state)
    try:
        os.makedirs(home, mode=0o755, exist_ok=True)
        os.chmod(home, _READABLE)  # whatever the umask is: users may boot root's
        lock = os.open(os.path.join(home, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise cannot("write to", home, error) from error
    try:
        _take(lock, waiting)
        _sweep(home)
        _check_room(home, room_bytes)
        work = os.path.join(home, f".new-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            os.mkdir(work, 0o700)
            yield work, lock
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def _take(lock: int, waiting: "Callable[[], None]") -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(lock, fcntl.LOCK_EX)


def _sweep(home: str) -> None:
    """Remove what killed commands left; nobody else is at work now."""
    for name in os.listdir(home):
        path = os.path.join(home, name)
        if name.startswith(".new-"):
            if os.path.islink(path):
                os.unlink(path)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _check_room(home: str, room_bytes: int) -> None:
    there = shutil.disk_usage(home).free
    if there < room_bytes:
        raise HostError(
            f"{room_bytes / 1e9:.1f} GB are needed in {home}, and there are {there / 1e9:.1f} GB",
            hint="free some space, or set RINGFENCE_STATE_DIR to a larger place",
        )


def publish(state: str, work: str, record: Record) -> Kernel:
    """Give what lies in `work` (vmlinux, modules/) its name, and return it, or the same kernel if it was there.

    It becomes the default one when there is none, or when it was built and the default one only fetched. Raises
    HostError.
    """
    record = msgspec.structs.replace(
        record,
        digest=_digest(work, record),
        made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    label = re.sub(r"[^A-Za-z0-9.+-]", "-", record.release)[:64]
    name = f"{record.kind}-{label}-{record.digest.partition(':')[2][:_DIGITS]}"
    place = kernels_dir(state, name)
    try:
        _settle(work, record)
        if os.path.isdir(place):  # made the same once more: what is there may be in use
            os.rename(os.path.join(work, "kernel.json"), os.path.join(place, "kernel.json"))
        else:
            os.rename(work, place)
        kernel = read(state, name)
        if _better(state, kernel):
            set_default(state, name)
    except OSError as error:
        raise cannot("write", place, error) from error
    return kernel


def _digest(work: str, record: Record) -> str:
    """Return the digest of all that a guest depends on."""
    modules = {name: file_digest(os.path.join(work, "modules", name)) for name in _module_names(record)}
    facts = [record.sha256, record.acpi, record.cmdline, record.modules, record.extras, modules]
    return f"sha256:{hashlib.sha256(msgspec.json.encode(facts, order='deterministic')).hexdigest()}"


def _module_names(record: Record) -> list[str]:
    return list(dict.fromkeys((*record.modules, *(name for more in record.extras.values() for name in more))))


def _settle(work: str, record: Record) -> None:
    """Write the lists, drop what is no part of a kernel, let everybody read the rest and nobody change it."""
    _write(os.path.join(work, "kernel.json"), msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    if record.modules:
        _write(os.path.join(work, "modules.list"), "".join(f"{m}\n" for m in record.modules).encode())
        os.chmod(os.path.join(work, "modules"), _READABLE)
    for name in _module_names(record):
        os.chmod(os.path.join(work, "modules", name), 0o444)
    vmlinux = os.open(os.path.join(work, "vmlinux"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(vmlinux, 0o444)
        os.fsync(vmlinux)
    finally:
        os.close(vmlinux)
    os.chmod(work, _READABLE)


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), 0o444)
        file.flush()
        os.fsync(file.fileno())


def _better(state: str, kernel: Kernel) -> bool:
    chosen = default(state)
    if not chosen:
        return True
    return kernel.kind == BUILT and read(state, chosen).kind in (BUILT, FETCHED)


def set_default(state: str, name: str) -> None:
    """Make `name`, a kernel of `state`, the one that is taken when none is named. Raises HostError."""
    new = kernels_dir(state, f".new-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        os.symlink(name, new)
        os.rename(new, kernels_dir(state, DEFAULT))
    except OSError as error:
        raise cannot("write to", kernels_dir(state), error) from error


def remove(state: str, name: str) -> str:
    """Remove a kernel; machines that run keep what they have opened. Return the new default's name if that changed.

    The best that is left takes its place: built before a user's own before fetched, the last made first. Raises
    HostError.
    """
    if not is_name(name):
        raise HostError(f"{name!r} is no name of a kernel")
    was_default = default(state) == name
    gone = kernels_dir(state, f".new-gone-{os.urandom(4).hex()}")
    try:
        if was_default:
            os.unlink(kernels_dir(state, DEFAULT))
        os.rename(kernels_dir(state, name), gone)
    except OSError as error:
        raise cannot("remove", kernels_dir(state, name), error) from error
    shutil.rmtree(gone, ignore_errors=True)  # what cannot be removed now is swept later
    if not was_default:
        return ""
    left = max(_readable(state), key=lambda kernel: (_RANK.get(kernel.kind, -1), _made(kernel)), default=None)
    if left is not None:
        set_default(state, left.name)
    return left.name if left is not None else ""


def _readable(state: str) -> "Iterator[Kernel]":
    for name in names(state):
        with contextlib.suppress(HostError):
            yield read(state, name)


def file_digest(path: str) -> str:
    """Return sha256:… of a file's content; raises OSError."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def cannot(do: str, path: str, error: OSError) -> HostError:
    """Return the HostError for an OSError: what could not be done to which path, and what to do about it."""
    import errno

    hints = {
        errno.ENOSPC: "free some space there",
        errno.EROFS: "set RINGFENCE_STATE_DIR to a place that can be written",
        errno.EACCES: "run as its owner, or set RINGFENCE_STATE_DIR",
        errno.EPERM: "run as its owner, or set RINGFENCE_STATE_DIR",
    }
    return HostError(
        f"cannot {do} {path}: {error.strerror or error}", hint=hints.get(error.errno or 0, "see --debug")
    )
