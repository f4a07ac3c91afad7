"""Keep the facts of the host between runs.

`host_key` is on the way of every run and imports only `os`; reading the kept facts needs msgspec.
"""

from __future__ import annotations

import os
import stat

from ringfence.errors import HostError
from ringfence.host.places import NAMES, find
from ringfence.linux import paths
from ringfence.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    import msgspec

    from ringfence.host.facts import Host

    T = TypeVar("T")

_MOST_BYTES = 1 << 20
_STATUS = ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
# Switches that can be turned while the host runs and that a policy may depend on.
_SWITCHES = (
    "/proc/sys/kernel/random/boot_id",
    "/proc/self/uid_map",
    "/proc/self/limits",
    "/proc/sys/user/max_user_namespaces",
    "/proc/sys/kernel/unprivileged_userns_clone",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/smt/active",
    "/sys/kernel/mm/ksm/run",
    "/sys/kernel/security/apparmor/profiles",
    "/sys/fs/cgroup/cgroup.controllers",
    "/sys/fs/cgroup/unified/cgroup.controllers",
)
_CGROUP_ROOT = "/sys/fs/cgroup"


def host_key() -> str:
    """Return text that changes whenever the facts of this host, as this process sees them, may have changed.

    Covers the boot, this version, the user and its rights and limits, the cgroup mounts, the runtimes and the
    switches that an administrator can turn while the host runs. Takes about half a millisecond.
    """
    return "|".join(
        (VERSION, str(os.geteuid()), *_process(), *_switches(), *_mounts(), *_programs(), *_places())
    )


def detect_cached(path: str) -> Host:
    """Return the facts kept in file `path`, or detect them and keep them there; see `kept`."""
    key = host_key()
    found = kept(path, key, _host_type)
    if found is not None:
        return found
    from ringfence.host.detect import detect

    host = detect()
    keep(path, key, host)
    return host


def _host_type() -> type[Host]:
    from ringfence.host.facts import Host

    return Host


def kept(path: str, key: str, kind: Callable[[], type[T]]) -> T | None:
    """Return the value of type `kind()` kept in file `path` for `key`, None when there is none to be believed.

    The file is believed only if it is a regular file of this user that nobody else can open, and its key is
    `key`; anything odd is None.
    """
    content = _read_own(path)
    first, _, rest = content.partition(b"\n")
    if not rest or first != _line(key):
        return None
    import msgspec

    try:
        return msgspec.json.decode(rest, type=kind())
    except (msgspec.DecodeError, msgspec.ValidationError):
        return None


def keep(path: str, key: str, value: msgspec.Struct) -> None:
    """Keep `value` for `key` in file `path`; one that cannot be written is no error."""
    import msgspec

    content = _line(key) + b"\n" + msgspec.json.encode(value)
    temporary = f"{path}.{os.urandom(8).hex()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.rename(temporary, path)
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:
            return


def _line(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape").replace(b"\n", b"\\n")


def _read_own(path: str) -> bytes:
    """Return the content of `path` if only this user can change or read it, else nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
        if not own or found.st_mode & 0o077 or found.st_size > _MOST_BYTES:
            return b""
        return file.read(_MOST_BYTES)


def _text(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        text = b""
        # A file of /proc or /sys gives a page at a time, and the list of AppArmor's profiles may be longer.
        while len(text) < _MOST_BYTES >> 2 and (piece := os.read(fd, 16384)):
            text += piece
        return text.decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(fd)


def _process() -> list[str]:
    lines = _text("/proc/self/status").splitlines()
    # Root places its groups by absolute path; only a rootless caller depends on where it is itself.
    own = _text("/proc/self/cgroup") if os.geteuid() else ""
    return [*(line for line in lines if line.startswith(_STATUS)), own]


def _switches() -> list[str]:
    swaps = [line.split()[0] for line in _text("/proc/swaps").splitlines()]
    return [*(_text(path) for path in _SWITCHES), *swaps, _device("/dev/kvm")]


def _device(path: str) -> str:
    """Name a device node and whether it may be opened: a module that is loaded again makes another inode."""
    try:
        found = os.stat(path)
    except OSError as error:
        return str(error.errno)
    return f"{found.st_ino}:{found.st_mode}:{found.st_rdev}:{os.access(path, os.R_OK | os.W_OK)}"


def _mounts() -> list[str]:
    """Name the device of the cgroup root and of each mount below it, and whether it can be written to."""
    try:
        places = [_CGROUP_ROOT, *(f"{_CGROUP_ROOT}/{name}" for name in sorted(os.listdir(_CGROUP_ROOT)))]
    except OSError:
        return []
    return [
        f"{place}:{os.stat(place).st_dev}:{os.statvfs(place).f_flag & os.ST_RDONLY}"
        for place in places
        if os.path.isdir(place)
    ]


def _programs() -> list[str]:
    found = []
    for path in (*map(find, NAMES), "/etc/subuid", "/etc/subgid", "/usr/bin/newuidmap"):
        try:
            about = os.stat(path)
        except OSError:
            found.append("-")
            continue
        found.append(f"{path}:{about.st_ino}:{about.st_size}:{about.st_mtime_ns}:{about.st_mode}")
    return found


def _places() -> list[str]:
    found = []
    for place in (paths.state_dir, paths.run_dir):
        try:
            directory = place()
            found.append(f"{directory}:{os.stat(directory).st_dev}")
        except (OSError, HostError):
            found.append("-")
    return found
