"""What every runtime offers, and what it is given for one sandbox."""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from ringfence.plan.document import Plan

    class Runtime(Protocol):
        """Carries out plans of one tier."""

        def start(self, plan: Plan, instance: "Instance", descriptors: "tuple[int, ...]") -> "Starting":
            """Start the agent in a sandbox, with `descriptors` as its 3, 4, 5; raises SandboxError, HostError."""
            ...


# A runtime has some milliseconds of work left once its agent runs, or it has failed.
PATIENCE_S = 10.0
_SIGKILL = 9


class Instance:
    """What differs from one sandbox of a plan to the next.

    `id` names it everywhere (host name, cgroup, directory); `directory` is its own, absolute; `staging` the empty
    directory on which every set-up builds its root, in a mount namespace of its own; `base` the first host id of
    its range, 0 when it has none. `detached` says whether the job's output goes to a log, `traced` whether its
    system calls are traced. `memory_base_bytes` is what a kernel of its own used before the job, found at the gate.
    `snapshot` says how a machine comes up: see `ringfence.runtime.bridge`.
    """

    __slots__ = (
        "base",
        "cgroup_path",
        "detached",
        "directory",
        "id",
        "memory_base_bytes",
        "snapshot",
        "staging",
        "traced",
    )

    def __init__(
        self,
        *,
        id: str,
        directory: str,
        staging: str,
        base: int,
        cgroup_path: str,
        detached: bool = False,
        traced: bool = False,
        memory_base_bytes: int = 0,
        snapshot: str = "",
    ) -> None:
        """Hold the facts."""
        self.detached = detached
        self.traced = traced
        self.memory_base_bytes = memory_base_bytes
        self.snapshot = snapshot
        self.id = id
        self.directory = directory
        self.staging = staging
        self.base = base
        self.cgroup_path = cgroup_path


class Starting:
    """A runtime's process that is setting a sandbox up; it ends by itself when the agent runs, or has failed."""

    __slots__ = ("_kept", "_said", "pid", "status")

    def __init__(self, pid: int, said: int) -> None:
        """Watch process `pid`, a child of ours; `said` is a pipe that its complaints arrive on, now ours."""
        self.pid = pid
        self.status: int | None = None
        self._kept = [said]
        self._said = said

    def keep(self, fd: int) -> None:
        """Keep `fd` open until the runtime needs it no more; it opens it through our entry in /proc."""
        self._kept.append(fd)

    def release(self) -> None:
        """Close what was kept: the agent runs, or never will. Idempotent."""
        for fd in self._kept:
            os.close(fd)
        self._kept = []
        self._said = -1

    def wait(self) -> int:
        """Wait for the runtime to end and return its exit status; negative for a signal. Idempotent.

        One that has not ended after `PATIENCE_S` seconds never will: it is killed, with all of its session.
        """
        if self.status is None:
            try:
                if not self._ended():
                    os.killpg(self.pid, _SIGKILL)
                _, status = os.waitpid(self.pid, 0)
            except (ChildProcessError, ProcessLookupError):  # somebody in this process reaps everything
                self.status = 0
            else:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def _ended(self) -> bool:
        import select

        pidfd = os.pidfd_open(self.pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return bool(poll.poll(PATIENCE_S * 1000))
        finally:
            os.close(pidfd)

    def words(self, most_bytes: int = 2000) -> str:
        """Return the last of what the runtime said, for an error message; once, before `release`."""
        if self._said < 0:
            return ""
        os.set_blocking(self._said, False)
        try:
            text = os.read(self._said, 1 << 16)
        except BlockingIOError:
            text = b""
        return text[-most_bytes:].decode("utf-8", "replace").strip()
