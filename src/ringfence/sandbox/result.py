"""What a run comes to."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.proof.prove import Proof


class Usage:
    """What the sandbox used, from its cgroup; None where this host does not count it."""

    __slots__ = ("cpu_s", "io_read_bytes", "io_write_bytes", "memory_peak_bytes", "wall_s")

    def __init__(
        self,
        *,
        wall_s: float,
        cpu_s: float | None = None,
        memory_peak_bytes: int | None = None,
        io_read_bytes: int | None = None,
        io_write_bytes: int | None = None,
    ) -> None:
        """Hold seconds and bytes."""
        self.wall_s = wall_s
        self.cpu_s = cpu_s
        self.memory_peak_bytes = memory_peak_bytes
        self.io_read_bytes = io_read_bytes
        self.io_write_bytes = io_write_bytes

    def as_dict(self) -> dict[str, float | int | None]:
        """Return plain data for JSON."""
        return {name: getattr(self, name) for name in ("wall_s", *self.__slots__[:-1])}

    def __repr__(self) -> str:
        return f"Usage({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"


class Result:
    """The end of a job.

    exit_status       the command's own; 124 time limit, 126 not executable, 127 not found, 128+N by signal N,
                      137 with `oom_killed` when memory ran out
    signal            the signal that killed the command, or 0
    stdout, stderr    what was captured (bytes); empty when the streams went elsewhere
    timed_out, oom_killed, output_truncated
    usage             a `Usage`
    notes             sentences of a kernel of its own (gVisor): what the job wanted that it lacks, why it crashed
    proof             what the kernel enforced before the first instruction; None if nothing got that far
    """

    __slots__ = (
        "exit_status",
        "notes",
        "oom_killed",
        "output_truncated",
        "proof",
        "signal",
        "stderr",
        "stdout",
        "timed_out",
        "usage",
    )

    def __init__(
        self,
        exit_status: int,
        *,
        signal: int = 0,
        stdout: bytes = b"",
        stderr: bytes = b"",
        timed_out: bool = False,
        oom_killed: bool = False,
        output_truncated: bool = False,
        notes: tuple[str, ...] = (),
        usage: Usage | None = None,
        proof: Proof | None = None,
    ) -> None:
        """Hold the facts."""
        self.exit_status = exit_status
        self.signal = signal
        self.stdout = stdout
        self.stderr = stderr
        self.timed_out = timed_out
        self.oom_killed = oom_killed
        self.output_truncated = output_truncated
        self.notes = notes
        self.usage = usage or Usage(wall_s=0.0)
        self.proof = proof

    def __repr__(self) -> str:
        facts = [f"exit_status={self.exit_status}"]
        facts += [name for name in ("timed_out", "oom_killed", "output_truncated") if getattr(self, name)]
        facts += [f"stdout={self.stdout[:60]!r}", f"stderr={self.stderr[:60]!r}"]
        return f"Result({', '.join(facts)})"
