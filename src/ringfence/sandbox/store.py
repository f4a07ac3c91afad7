"""Where sandboxes are recorded: one directory each under the run directory, and a lock that says whether it lives.

The lock is a flock(2) on an open file description that the launcher and the agent share: the kernel drops it when
the last of them is gone, whatever killed them. So "does it live?" needs no process id, and whoever gets the lock
may clean up. A directory without a lock is settled: the sandbox has ended, and only what is kept until `rm` is left.
On the way of every run: imports only `os` and `fcntl`.
"""

from __future__ import annotations

import fcntl
import os

from ringfence.errors import SandboxError, UsageError
from ringfence.linux.paths import run_dir, state_dir
from ringfence.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Under these names a directory is not a sandbox yet, or no longer.
_NEW = ".new-"
_GONE = ".gone-"
LOCK = "lock"
_RECORD = "record.json"
_STARTED = "started"
_ENDED = "ended.json"
_MOST_BYTES = 1 << 20
NO_ROOM = "free some space there, or set RINGFENCE_RUN_DIR"


class Entry:
    """The directory of one sandbox, `lock_fd` >= 0 while this process holds its lock."""

    __slots__ = ("_record", "directory", "id", "lock_fd")

    def __init__(self, directory: str, lock_fd: int = -1) -> None:
        """Name the directory; nothing is read."""
        self.directory = directory
        self.id = os.path.basename(directory)
        self.lock_fd = lock_fd
        self._record: dict[str, object] | None = None

    def path(self, name: str) -> str:
        """Return the path of file `name` of this sandbox."""
        return f"{self.directory}/{name}"

    def log_path(self) -> str:
        """Return the path of the log of a detached sandbox; it is on disk, not in the run directory."""
        return f"{_logs_of(os.path.dirname(os.path.dirname(self.directory)))}/{self.id}"

    def write_record(self, record: Mapping[str, object]) -> None:
        """Write what `ps` and `gc` need to know, in less than 1 MiB. Raises SandboxError."""
        _write(self.directory, _RECORD, record)
        self._record = dict(record)

    def record(self) -> dict[str, object]:
        """Return the record, {} when there is none yet or it is damaged; whoever wrote it reads no file."""
        return _read(self.path(_RECORD)) if self._record is None else self._record

    def write_ended(self, ended: Mapping[str, object]) -> None:
        """Write what is known of the end of a detached sandbox. Raises SandboxError."""
        _write(self.directory, _ENDED, ended)

    def ended(self) -> dict[str, object]:
        """Return how it ended, {} while that is not known."""
        return _read(self.path(_ENDED))

    def mark_started(self) -> None:
        """Note that the job is let go; raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(self.path(_STARTED), flags, 0o600))

    def started(self) -> bool:
        """Say whether the job was ever let go."""
        return os.path.lexists(self.path(_STARTED))

    def try_lock(self) -> bool:
        """Take the lock if nobody alive has it; then nothing of the sandbox can start any more.

        False as well when there is no lock, because the sandbox is settled or removed.
        """
        fd = self._flock(fcntl.LOCK_EX)
        if fd is None or fd < 0:
            return False
        self.lock_fd = fd
        return True

    def alive(self) -> bool:
        """Say whether somebody holds the lock: an agent, its launcher, or, for a moment, who cleans up after them."""
        fd = self._flock(fcntl.LOCK_SH)
        if fd is not None and fd >= 0:
            os.close(fd)
        return fd is None

    def _flock(self, how: int) -> int | None:
        """Return a descriptor that has the lock, -1 when there is no lock, None when another has it."""
        try:
            fd = os.open(self.path(LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return -1
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return None
        return fd

    def unlock(self) -> None:
        """Let go of our hold on the lock; an agent that shares it keeps it."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def remove(self) -> None:
        """Remove the log and the directory; what a crash leaves of them, `remove_unfinished` removes."""
        _unlink(self.log_path())
        gone = f"{os.path.dirname(self.directory)}/{_GONE}{self.id}"
        try:
            os.rename(self.directory, gone)
        except FileNotFoundError:
            return
        remove_tree(gone)


def sandboxes_dir() -> str:
    """Return the directory of all sandboxes, made if need be."""
    return _made(f"{run_dir()}/sandboxes", 0o700)


def staging_dir() -> str:
    """Return the empty directory on which set-ups mount; users of sandboxes must be able to pass through it."""
    return _made(f"{run_dir()}/staging", 0o711)


def remove_stray_logs() -> list[str]:
    """Remove logs whose sandbox is gone without them, as after a reboot; return their names."""
    removed = []
    run, home = run_dir(), _logs_home()
    for name in os.listdir(home):
        if not name.startswith("%2F"):
            continue
        logs, whose = f"{home}/{name}", name.replace("%2F", "/").replace("%25", "%")
        for log in os.listdir(logs):
            # A log is made after its sandbox and removed before it.
            if not os.path.isdir(f"{whose}/sandboxes/{log}" if whose == run else whose):
                _unlink(f"{logs}/{log}")
                removed.append(log)
        if not os.path.isdir(whose):
            remove_tree(logs)
    return removed


def _logs_home() -> str:
    return _made(f"{state_dir()}/logs", 0o700)


def _logs_of(run: str) -> str:
    # A directory for each run directory: else nobody could tell a log without a sandbox from one of another's.
    name = run.replace("%", "%25").replace("/", "%2F")
    return _made(f"{_logs_home()}/{name}", 0o700)


def create() -> Entry:
    """Make the directory of a new sandbox, locked. Raises SandboxError when the disk does not take it."""
    home = sandboxes_dir()
    sandbox_id = os.urandom(6).hex()
    # Under another name until it is locked: whoever cleans up takes an unlocked one for dead.
    new, final = f"{home}/{_NEW}{sandbox_id}", f"{home}/{sandbox_id}"
    guard, fd = _guard(home), -1
    try:
        fcntl.flock(guard, fcntl.LOCK_SH)
        os.mkdir(new, 0o700)
        fd = os.open(f"{new}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.rename(new, final)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        remove_tree(new)
        raise SandboxError(f"cannot make {final}: {error.strerror}", hint=NO_ROOM) from error
    finally:
        os.close(guard)
    return Entry(final, fd)


def entries() -> Iterator[Entry]:
    """Yield every sandbox that is recorded, in the order of their names."""
    home = sandboxes_dir()
    for name in sorted(os.listdir(home)):
        if not name.startswith("."):
            yield Entry(f"{home}/{name}")


def remove_unfinished() -> list[str]:
    """Remove directories that somebody was killed over while making or removing them; return their names."""
    home = sandboxes_dir()
    if not any(name.startswith((_NEW, _GONE)) for name in os.listdir(home)):
        return []
    guard = _guard(home)
    try:
        # Whoever makes one holds this lock meanwhile; if it is free, all that are here are nobody's.
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        names = [name for name in os.listdir(home) if name.startswith((_NEW, _GONE))]
        for name in names:
            remove_tree(f"{home}/{name}")
    except BlockingIOError:
        return []
    finally:
        os.close(guard)
    return names


def find(name: str) -> Entry:
    """Return the sandbox whose id, beginning of an id, or name is `name`; raises UsageError otherwise."""
    found = []
    for entry in entries():
        if entry.id == name or entry.record().get("name") == name:
            return entry
        if len(name) >= 4 and entry.id.startswith(name):
            found.append(entry)
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{name!r} is the beginning of {len(found)} ids", hint="give more of it")
    raise UsageError(f"no sandbox {name!r}", hint="'ringfence ps --all' lists them")


class naming:  # noqa: N801 - used as a function
    """While it is entered, nobody else of this run directory gives a sandbox a name."""

    __slots__ = ("_fd",)

    def __enter__(self) -> None:
        # Not the directory of sandboxes, which `create` locks as well.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(f"{run_dir()}/naming.lock", flags, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def name_taken(name: str) -> bool:
    """Say whether a recorded sandbox has `name`."""
    return any(entry.record().get("name") == name for entry in entries())


def remove_tree(path: str) -> None:
    """Remove a directory of ours without following links; what is already gone is fine."""
    try:
        with os.scandir(path) as found:
            inside = list(found)
        for item in inside:
            if item.is_dir(follow_symlinks=False):
                remove_tree(item.path)
            else:
                _unlink(item.path)
        os.rmdir(path)
    except FileNotFoundError:
        return


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def _guard(home: str) -> int:
    return os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _made(path: str, mode: int) -> str:
    try:
        os.mkdir(path, mode)
        os.chmod(path, mode)
    except FileExistsError:
        pass
    except OSError as error:
        raise SandboxError(
            f"cannot make {path}: {error.strerror}",
            hint="free some space there, or set RINGFENCE_RUN_DIR and RINGFENCE_STATE_DIR",
        ) from error
    return path


def _write(directory: str, name: str, value: Mapping[str, object]) -> None:
    temporary = f"{directory}/.{name}.{os.getpid()}"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            data = memoryview(dumps(value).encode())
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
        os.rename(temporary, f"{directory}/{name}")
    except OSError as error:
        raise SandboxError(f"cannot write {directory}/{name}: {error.strerror}", hint=NO_ROOM) from error


def _read(path: str) -> dict[str, object]:
    import json  # not on the way of a run that finds nothing to clean up

    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return {}
    try:
        found = json.loads(os.read(fd, _MOST_BYTES))
    except (OSError, ValueError):
        return {}
    finally:
        os.close(fd)
    return found if isinstance(found, dict) else {}
