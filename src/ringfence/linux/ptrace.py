"""Read back the seccomp filter of a process from the kernel: ptrace(2), PTRACE_SECCOMP_GET_FILTER."""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)

# linux/ptrace.h
_DETACH = 17
_SEIZE = 0x4206
_INTERRUPT = 0x4207
_GET_FILTER = 0x420C
_WALL = 0x40000000  # linux/wait.h: wait for a tracee that is no child of ours
# linux/bpf_common.h, BPF_MAXINSNS; struct sock_filter has 8 bytes
_MOST_INSTRUCTIONS = 4096
_INSTRUCTION_BYTES = 8


def seccomp_filter(pid: int) -> bytes:
    """Return the oldest filter of `pid` as classic BPF, 8 bytes an instruction; `pid` is stopped for a moment.

    Takes CAP_SYS_ADMIN, a kernel with CONFIG_CHECKPOINT_RESTORE, and a caller without a filter of its own.
    Raises OSError.
    """
    _ptrace(_SEIZE, pid)
    try:
        _ptrace(_INTERRUPT, pid)
        os.waitpid(pid, _WALL)
        count = _ptrace(_GET_FILTER, pid)
        if count > _MOST_INSTRUCTIONS:
            raise OSError(f"a filter of {count} instructions")
        program = ctypes.create_string_buffer(count * _INSTRUCTION_BYTES)
        _ptrace(_GET_FILTER, pid, program)
        return program.raw
    finally:
        _ptrace(_DETACH, pid)


def _ptrace(request: int, pid: int, data: "ctypes.Array[ctypes.c_char] | None" = None) -> int:
    result: int = _libc.ptrace(request, pid, None, data)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"ptrace {request:#x}")
    return result
