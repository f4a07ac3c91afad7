"""Whether /dev/kvm runs real guest code: found out by running some, since some hosts offer one that does not.

The trial is a virtual machine with one CPU in long mode that executes what every guest kernel needs. It runs in a
process of its own, this very file as a program, because the kernel may not come back from KVM_RUN.
Source: https://docs.kernel.org/virt/kvm/api.html
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator
    from subprocess import Popen

DEVICE = "/dev/kvm"
_MOST_BYTES = 200  # of an answer
_KILL_S = 0.2  # how long a killed trial is waited for

# linux/kvm.h; the numbers of ioctls hold the sizes of their structures.
_GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_GET_SUPPORTED_CPUID = 0xC008AE05
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_SET_TSS_ADDR = 0xAE47
_RUN = 0xAE80
_SET_REGS = 0x4090AE82
_GET_SREGS = 0x8138AE83
_SET_SREGS = 0x4138AE84
_SET_CPUID2 = 0x4008AE90
_API_VERSION = 12
_EXIT_IO = 2
_EXIT_INTERNAL_ERROR = 17
_EXITS = {5: "it halted too early", 8: "it shut down", 9: "the CPU refused its state"}
_INTERNAL = {1: "emulation failed", 2: "unexpected event", 3: "interrupt not delivered"}
_XSAVE = 1 << 26  # CPUID leaf 1, ECX

# The guest's memory, in one 2 MiB page that maps to itself; only the beginning of it exists.
_MEMORY_BYTES = 0x10000
_TABLES = (0x1000, 0x2000, 0x3000)
_CODE = 0x4000
_DATA = 0x6000
_XSAVE_AREA = 0x7000
_STACK = 0x8000
_TURNS = 1_000_000
# A CPU needs some 1 ms of its time for the loop; emulation, at best 0.1 us an instruction, 100 times that.
_LOOP_MOST_S = 0.05

# After each piece of code the guest writes a byte to a port, which gives control back to the host.
_OUT = b"\xe6\xf4"  # out 0xf4, al
_PIECES = {
    "cpuid": (
        b"\x31\xc0\x31\xc9"  # xor eax, eax; xor ecx, ecx
        b"\x0f\xa2"  # cpuid
        b"\x89\x04\x25\x00\x60\x00\x00"  # mov [_DATA], eax
    ),
    "cmpxchg16b": (
        b"\x31\xc0\x31\xd2"  # xor eax, eax; xor edx, edx
        b"\xbb\x01\x00\x00\x00\xb9\x02\x00\x00\x00"  # mov ebx, 1; mov ecx, 2
        b"\xf0\x48\x0f\xc7\x0c\x25\x10\x60\x00\x00"  # lock cmpxchg16b [_DATA + 16]
    ),
    "xsave": (
        b"\xdb\xe3"  # fninit
        b"\x31\xc9\x0f\x01\xd0"  # xor ecx, ecx; xgetbv
        b"\x31\xd2\xb8\x03\x00\x00\x00"  # xor edx, edx; mov eax, 3: the x87 and SSE state
        b"\x48\x0f\xae\x24\x25\x00\x70\x00\x00"  # xsave64 [_XSAVE_AREA]
        b"\x48\x0f\xae\x2c\x25\x00\x70\x00\x00"  # xrstor64 [_XSAVE_AREA]
    ),
    "loop": (
        b"\xb9\x40\x42\x0f\x00"  # mov ecx, _TURNS
        b"\xff\xc9\x75\xfc"  # dec ecx; jnz to the dec
    ),
}


def probe_kvm(timeout_s: float = 1.0) -> str:
    """Return "" if KVM runs real guest instructions here, else one line why not; takes `timeout_s` at most.

    The trial itself is over in some milliseconds, most of the time is the start of an interpreter.
    """
    if not os.path.exists(DEVICE):
        return f"{DEVICE} is not there"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return "permission denied"
    if os.uname().machine != "x86_64":
        return f"no trial for {os.uname().machine}"
    if not sys.executable:
        return "no interpreter to try it with"
    return _tried(timeout_s)


def _tried(timeout_s: float) -> str:
    from subprocess import DEVNULL, PIPE, Popen

    # By path: -I and -S keep the environment and site-packages out, and with them this package.
    argv = [sys.executable, "-I", "-S", os.path.abspath(__file__), str(timeout_s)]
    try:
        trial = Popen(
            argv, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, cwd="/", env={}, start_new_session=True
        )
    except OSError as error:
        return f"cannot start a trial: {error.strerror}"
    answer = _answer(trial, timeout_s)
    if answer is None:
        return f"the guest did not finish within {timeout_s:g} s"
    if answer == "works\n" and trial.returncode == 0:
        return ""
    return answer.strip() or f"the trial ended with {trial.returncode}"


def _answer(trial: Popen[bytes], timeout_s: float) -> str | None:
    """Return what `trial` said, None if it took too long; it is then gone, as far as that can be waited for."""
    from subprocess import TimeoutExpired

    try:
        said, _ = trial.communicate(timeout=timeout_s)
        return said[:_MOST_BYTES].decode("ascii", "replace").partition("\0")[0]
    except TimeoutExpired:
        trial.kill()
        try:
            trial.wait(_KILL_S)
        except TimeoutExpired:
            pass  # stuck in the kernel: it ends when that lets go of it
        return None
    finally:
        if trial.stdout is not None:
            trial.stdout.close()


def _main(timeout_s: float) -> str:
    """Run the guest and return the answer; for the process of its own."""
    import signal

    # The default action ends this process, also when nobody is left who would kill it.
    signal.setitimer(signal.ITIMER_REAL, timeout_s + _KILL_S)
    try:
        return _guest()
    except OSError as error:
        return f"internal error ({error.strerror})"


def _guest() -> str:
    import mmap
    import struct
    from fcntl import ioctl

    kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    if ioctl(kvm, _GET_API_VERSION, 0) != _API_VERSION:
        return "internal error (an unknown API version)"
    vm = ioctl(kvm, _CREATE_VM, 0)
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    # Three pages that an Intel CPU without unrestricted guests needs for itself, below 4 GiB.
    _ioctl_unsigned(vm, _SET_TSS_ADDR, 0xFFFBD000)
    region = struct.pack("<IIQQQ", 0, 0, 0, _MEMORY_BYTES, _address(memory))
    ioctl(vm, _SET_USER_MEMORY_REGION, region)
    cpu = ioctl(vm, _CREATE_VCPU, 0)
    xsave = _give_features(kvm, cpu)
    pieces = {name: code for name, code in _PIECES.items() if xsave or name != "xsave"}
    _fill(
        memory, b"".join(b"%b\xb0%c%b" % (code, turn, _OUT) for turn, code in enumerate(pieces.values(), 1))
    )
    _long_mode(cpu, xsave=xsave)
    run = mmap.mmap(cpu, ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
    for turn, name in enumerate(pieces, 1):
        problem = _piece(cpu, run, turn) or _wrong(name, memory)
        if problem:
            return f"internal error (the guest's {name}: {problem})"
    return "works"


def _piece(cpu: int, run: mmap.mmap, turn: int) -> str:
    """Let the guest go on until it says `turn`; return what happened instead."""
    import struct
    import time
    from fcntl import ioctl

    began_s = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
    ioctl(cpu, _RUN, 0)
    took_s = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID) - began_s
    (exit_reason,) = struct.unpack_from("<I", run, 8)
    if exit_reason == _EXIT_INTERNAL_ERROR:
        (kind,) = struct.unpack_from("<I", run, 32)
        return _INTERNAL.get(kind, f"KVM's error {kind}")
    if exit_reason != _EXIT_IO:
        return _EXITS.get(exit_reason, f"it stopped with KVM's exit {exit_reason}")
    (offset,) = struct.unpack_from("<Q", run, 40)
    if run[offset] != turn:
        return "it lost its way"
    if took_s > _LOOP_MOST_S:
        return f"{took_s * 1000:.0f} ms of CPU time: it is emulated"
    return ""


def _wrong(name: str, memory: mmap.mmap) -> str:
    """Return what is wrong with the result that the guest left in its memory."""
    import struct

    if name == "cpuid" and not any(memory[_DATA : _DATA + 4]):
        return "no features"
    if name == "cmpxchg16b" and struct.unpack_from("<QQ", memory, _DATA + 16) != (1, 2):
        return "nothing was exchanged"
    # The x87 control word after fninit; after a reset XCR0 enables no more than x87: Intel SDM volume 1, 13.3.
    if name == "xsave" and struct.unpack_from("<H", memory, _XSAVE_AREA) != (0x37F,):
        return "another state was saved"
    return ""


def _fill(memory: mmap.mmap, code: bytes) -> None:
    import struct

    present_writable, large = 0x3, 0x80
    following = (_TABLES[1] | present_writable, _TABLES[2] | present_writable, present_writable | large)
    for table, entry in zip(_TABLES, following, strict=True):
        struct.pack_into("<Q", memory, table, entry)
    memory[_CODE : _CODE + len(code)] = code


def _give_features(kvm: int, cpu: int) -> bool:
    """Give `cpu` every feature that KVM can; return whether XSAVE is one."""
    import struct
    from fcntl import ioctl

    most, entry_bytes = 256, 40
    table = bytearray(8 + most * entry_bytes)
    struct.pack_into("<I", table, 0, most)
    ioctl(kvm, _GET_SUPPORTED_CPUID, table, True)
    ioctl(cpu, _SET_CPUID2, table, True)
    (count,) = struct.unpack_from("<I", table, 0)
    leaves = (struct.unpack_from("<7I", table, 8 + place * entry_bytes) for place in range(min(count, most)))
    return any(leaf[0] == 1 and leaf[5] & _XSAVE for leaf in leaves)


def _long_mode(cpu: int, *, xsave: bool) -> None:
    """Set the registers: 64-bit mode, at the code, with a stack."""
    import struct
    from fcntl import ioctl

    sregs = bytearray(312)
    ioctl(cpu, _GET_SREGS, sregs, True)
    for place, segment in _segments():
        struct.pack_into("<QIH10B", sregs, place * 24, *segment)
    cr0 = 0x80050033  # PG AM WP NE ET MP PE
    cr4 = 0x620 | (0x40000 if xsave else 0)  # PAE OSFXSR OSXMMEXCPT, OSXSAVE
    efer = 0x500  # LME LMA
    struct.pack_into("<6Q", sregs, 224, cr0, 0, _TABLES[0], cr4, 0, efer)
    ioctl(cpu, _SET_SREGS, bytes(sregs))
    regs = bytearray(144)
    struct.pack_into("<Q", regs, 48, _STACK)
    struct.pack_into("<QQ", regs, 128, _CODE, 2)  # RIP, and RFLAGS with the bit that is always set
    ioctl(cpu, _SET_REGS, bytes(regs))


def _segments() -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield place and content of struct kvm_segment for cs, the five data segments and tr."""
    # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding
    yield 0, (0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
    for place in range(1, 6):
        yield place, (0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    yield 6, (0, 0xFFFF, 24, 11, 1, 0, 0, 0, 0, 0, 0, 0, 0)


def _address(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _ioctl_unsigned(fd: int, request: int, argument: int) -> None:
    """Like fcntl.ioctl, which takes an int only, for an address above 2 GiB."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(argument)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.stdout.write(_main(float(sys.argv[1])) + "\n")
