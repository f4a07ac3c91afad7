"""What a seccomp filter answers to a system call: the part of classic BPF that such filters are made of.

Source: https://docs.kernel.org/userspace-api/seccomp_filter.html and linux/filter.h
"""

from _struct import Struct, iter_unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# struct seccomp_data: nr, arch, instruction_pointer, six arguments
_DATA = Struct("<iIQ6Q")
_WORDS = Struct("<16I")
# struct sock_filter: code, jump if true, jump if false, constant
_INSTRUCTION = "<HBBI"
_WORD = 0xFFFFFFFF

_LD_ABS, _LD_IMM, _LD_MEM, _LDX_IMM, _LDX_MEM, _ST, _STX = 0x20, 0x00, 0x60, 0x01, 0x61, 0x02, 0x03
_TAX, _TXA = 0x07, 0x87
_RET_K, _RET_A = 0x06, 0x16
_JA, _JEQ_K = 0x05, 0x15


def read_program(program: bytes) -> "list[tuple[int, int, int, int]]":
    """Return (code, jt, jf, k) of each instruction. Raises ValueError for a program that is no whole number."""
    if not program or len(program) % 8:
        raise ValueError(f"a filter of {len(program)} bytes")
    return list(iter_unpack(_INSTRUCTION, program))


def answer(
    program: "Sequence[tuple[int, int, int, int]]", number: int, arch: int, args: "Sequence[int]"
) -> int:
    """Return the 32-bit SECCOMP_RET_* value for one call. Raises ValueError for what no such filter does."""
    words = _WORDS.unpack(_DATA.pack(number, arch, 0, *(list(args) + [0] * 6)[:6]))
    a = x = 0
    memory = [0] * 16
    place = 0
    while place < len(program):
        code, jt, jf, k = program[place]
        place += 1
        # First what a filter mostly is made of: a hundred comparisons in a row, at every start.
        if code == _JEQ_K:
            place += jt if a == k else jf
        elif code == _LD_ABS:
            a = words[k >> 2]
        elif code & 0x07 == 0x05:
            place += k if code == _JA else jt if _holds(code, a, x if code & 0x08 else k) else jf
        elif code == _RET_K:
            return k
        elif code == _RET_A:
            return a
        elif code & 0x07 == 0x04:
            a = _computed(code, a, x if code & 0x08 else k)
        elif code in (_LD_IMM, _LD_MEM):
            a = k if code == _LD_IMM else memory[k]
        elif code in (_LDX_IMM, _LDX_MEM):
            x = k if code == _LDX_IMM else memory[k]
        elif code in (_ST, _STX):
            memory[k] = a if code == _ST else x
        elif code == _TAX:
            x = a
        elif code == _TXA:
            a = x
        else:
            raise ValueError(f"instruction {code:#x} in a seccomp filter")
    raise ValueError("a seccomp filter that ends without an answer")


def _holds(code: int, a: int, operand: int) -> bool:
    kind = code & 0xF0
    if kind == 0x10:
        return a == operand
    if kind == 0x20:
        return a > operand
    if kind == 0x30:
        return a >= operand
    if kind == 0x40:
        return bool(a & operand)
    raise ValueError(f"jump {code:#x} in a seccomp filter")


def _computed(code: int, a: int, operand: int) -> int:
    kind = code & 0xF0
    if kind == 0x50:
        return a & operand
    if kind == 0x40:
        return a | operand
    if kind == 0x00:
        return (a + operand) & _WORD
    if kind == 0x10:
        return (a - operand) & _WORD
    if kind == 0x60:
        return (a << operand) & _WORD
    if kind == 0x70:
        return a >> operand
    if kind == 0x80:
        return -a & _WORD
    raise ValueError(f"operation {code:#x} in a seccomp filter")
