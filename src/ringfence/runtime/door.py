"""The door of a ring with a kernel of its own in it: its command line and its descriptors (agent/PROTOCOL.md)."""

from __future__ import annotations

import os

from ringfence.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Guest, Plan
    from ringfence.runtime.base import Instance

# What the runtime and the kernel inside say, in the sandbox's directory; the door writes 64 KiB of it at most.
WORDS = "runtime.log"
# The door's own last words, beyond these 64 KiB: the time limit had passed, and the sandbox was still there.
_LATE = b"\ndeadline\n"
# After the agent's own limit, which is a second after the host's.
_GRACE_S = 2.0
# The host pid of the door, as the runtime says it.
PID_FILE = "pid"
_TRACE = 10
# What a detached job's log grows by beyond its limit: agent/output.c gives the end record room of its own.
END_BYTES = 64
NO_LIMIT = 1 << 62


def arguments(plan: Plan, guest: Guest, instance: Instance) -> list[str]:
    """Return the door's command line, with runsc's in it."""
    limit = plan["output_bytes"]
    log_bytes = 0
    if instance.detached:
        log_bytes = NO_LIMIT if limit is None else limit + END_BYTES
    # Standard error of what the door starts is a pipe to the door.
    words = "/proc/self/fd/2"
    # As JSON: in a text an argument with a newline in it would begin a line of its own.
    log = (f"--debug-log=/proc/self/fd/{_TRACE}", "--debug-log-format=json", "--debug-command=boot")
    trace = ("--debug=true", "--strace", *log)
    return [
        plan["oci"]["process"]["args"][0],
        "--door",
        str(log_bytes),
        str(deadline_ms(plan["time_s"])),
        "/runsc",
        "--root=/state",
        f"--panic-log={words}",
        *guest["flags"],
        *(trace if instance.traced else ()),
        "run",
        "--detach",
        "--bundle=/bundle",
        f"--user-log={words}",
        "--pass-fd=3:3",
        "--pass-fd=4:4",
        instance.id,
    ]


def deadline_ms(time_s: float | None) -> int:
    """Return the door's own time limit in ms: later than the agent's, for when that is stopped; 0 for none."""
    return 0 if time_s is None else round((time_s + _GRACE_S) * 1000)


class Descriptors:
    """What the door starts with beside the agent's three or four, and our ends of it.

    `log` is what a detached job's output goes into, `trace` what the trace comes out of; -1 where there is none.
    """

    __slots__ = ("_theirs", "log", "trace")

    def __init__(self, instance: Instance, log_path: str) -> None:
        """Open them. Raises HostError when the disk or the descriptors are used up."""
        self.log = self.trace = -1
        self._theirs: list[int] = []
        try:
            self._open(instance, log_path)
        except OSError as error:
            self.close_theirs()
            self.close()
            raise HostError(
                f"cannot make the sandbox's logs: {error.strerror}", hint="free some space there"
            ) from error

    def _open(self, instance: Instance, log_path: str) -> None:
        nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        self._theirs.append(nothing)
        self._theirs.append(new_file(f"{instance.directory}/{WORDS}"))
        log_from = log_file = trace = nothing
        if instance.detached:
            log_from, self.log = os.pipe2(os.O_CLOEXEC)
            self._theirs.append(log_from)
            log_file = new_file(log_path)
            self._theirs.append(log_file)
        if instance.traced:
            self.trace, trace = os.pipe2(os.O_CLOEXEC)
            self._theirs.append(trace)
            os.fchown(trace, instance.base, instance.base)  # runsc opens it by name, as root of the ring
        self._theirs += [log_from, log_file, trace]

    def after(self, descriptors: tuple[int, ...]) -> tuple[int, ...]:
        """Return the door's whole list; `descriptors` are the control socket, the listener, the lock, and a hold."""
        nothing, words = self._theirs[:2]
        hold = descriptors[3] if len(descriptors) > 3 else nothing
        return (*descriptors[:3], hold, words, *self._theirs[-3:])

    def close_theirs(self) -> None:
        """Close what the door has by now. Idempotent."""
        for descriptor in set(self._theirs):
            os.close(descriptor)
        self._theirs = []

    def take_trace(self) -> int:
        """Return the end that the trace comes out of; the caller owns it now."""
        fd, self.trace = self.trace, -1
        return fd

    def close(self) -> None:
        """Close our own ends. Idempotent."""
        for descriptor in (self.log, self.trace):
            if descriptor >= 0:
                os.close(descriptor)
        self.log = self.trace = -1


def new_file(path: str) -> int:
    """Return a descriptor of a new file that only we may open, for appending. Raises OSError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def door_pid(instance: Instance) -> int:
    """Return the door's host pid. Raises HostError when the runtime has not said it."""
    try:
        with open(f"{instance.directory}/{PID_FILE}", encoding="ascii") as file:
            return int(file.read(32))
    except (OSError, ValueError) as error:
        raise HostError(
            "the runtime does not say which process it has started", hint="see --debug"
        ) from error


def words(directory: str, most_bytes: int = 1 << 16) -> str:
    """Return what the runtime and the kernel inside have said so far, "" when nothing is there to read."""
    try:
        fd = os.open(f"{directory}/{WORDS}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, most_bytes).decode("utf-8", "replace").strip()
    finally:
        os.close(fd)


def late_end_ns(directory: str) -> int | None:
    """Return when the door ended the sandbox because its time was up and the agent inside had not; else None.

    In ns since 1970. The words before are hostile: whoever has taken the kernel inside over can say so too early, as
    it can in the log.
    """
    try:
        fd = os.open(f"{directory}/{WORDS}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        last = os.pread(fd, len(_LATE), max(0, found.st_size - len(_LATE)))
        return found.st_mtime_ns if last == _LATE else None
    finally:
        os.close(fd)
