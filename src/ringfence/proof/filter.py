"""Ask the filter that the kernel holds for a process what it answers to a few system calls."""

from __future__ import annotations

from ringfence.linux.ptrace import seccomp_filter
from ringfence.proof.bpf import answer, read_program

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringfence.plan.document import FilterSample

# linux/seccomp.h: the action is in the upper half, its data in the lower one.
_ACTIONS = {
    0x7FFF: "allowed",
    0x7FFC: "log",
    0x7FF0: "trace",
    0x7FC0: "notify",
    0x0003: "trap",
    0x0000: "kill_thread",
    0x8000: "kill_process",
}
_ERRNO = 0x0005


def answers(pid: int, samples: Sequence[FilterSample]) -> list[str]:
    """Return "CALL ANSWER" for each of `samples`; raises OSError, ValueError when it cannot be told."""
    program = read_program(seccomp_filter(pid))
    return [
        f"{sample['call']} {_in_words(answer(program, sample['number'], sample['arch'], sample['args']))}"
        for sample in samples
    ]


def _in_words(value: int) -> str:
    action, data = value >> 16, value & 0xFFFF
    if action == _ERRNO:
        from errno import errorcode

        return errorcode.get(data, f"errno {data}")
    return _ACTIONS.get(action, f"action {action:#x}")
