"""What every runtime offers, and what it is given for one sandbox."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from ringfence.plan.document import Plan

    class Runtime(Protocol):
        """Carries out plans of one tier."""

        def start(self, plan: Plan, instance: "Instance", descriptors: "tuple[int, ...]") -> "Starting":
            """Start the agent in a sandbox, with `descriptors` as its 3, 4, 5; raises SandboxError, HostError."""
            ...


class Instance:
    """What differs from one sandbox of a plan to the next.

    `id` names it everywhere (host name, cgroup, directory); `directory` is its own, absolute; `staging` the empty
    directory on which every set-up builds its root, in a mount namespace of its own; `base` the first host id of
    its range, 0 when it has none.
    """

    __slots__ = ("base", "cgroup_path", "directory", "id", "staging")

    def __init__(self, *, id: str, directory: str, staging: str, base: int, cgroup_path: str) -> None:
        """Hold the facts."""
        self.id = id
        self.directory = directory
        self.staging = staging
        self.base = base
        self.cgroup_path = cgroup_path


class Starting:
    """A runtime's process that is setting a sandbox up; it ends by itself when the agent runs, or has failed."""

    __slots__ = ("_kept", "log", "pid", "status")

    def __init__(self, pid: int, log: str) -> None:
        """Watch process `pid`, a child of ours, which writes its complaints to the file `log`."""
        self.pid = pid
        self.log = log
        self.status: int | None = None
        self._kept = -1

    def keep(self, fd: int) -> None:
        """Keep `fd` open until the runtime needs it no more; it opens it through our entry in /proc."""
        self._kept = fd

    def release(self) -> None:
        """Close what was kept: the agent runs, or never will."""
        import os

        if self._kept >= 0:
            os.close(self._kept)
            self._kept = -1

    def wait(self) -> int:
        """Wait for the runtime to end and return its exit status; negative for a signal. Idempotent."""
        import os

        if self.status is None:
            try:
                _, status = os.waitpid(self.pid, 0)
            except ChildProcessError:  # somebody in this process reaps everything
                self.status = 0
            else:
                self.status = os.waitstatus_to_exitcode(status)
        self.release()
        return self.status

    def words(self, most_bytes: int = 2000) -> str:
        """Return the last of what the runtime said, for an error message."""
        import os

        try:
            fd = os.open(self.log, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return ""
        try:
            size = os.fstat(fd).st_size
            text = os.pread(fd, most_bytes, max(0, size - most_bytes))
        finally:
            os.close(fd)
        return text.decode("utf-8", "replace").strip()
