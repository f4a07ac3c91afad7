"""System call names and numbers, as the libseccomp of this machine knows them."""

import ctypes
from functools import cache

from ringfence.errors import HostError

AUDIT_ARCH = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}  # linux/audit.h; keys as `uname -m` says
HIGHEST_NUMBER = 1023  # no 64-bit architecture is near it: the newest call of Linux 6.17 is 469


@cache
def libseccomp() -> ctypes.CDLL:
    """Return the library, loaded once. Raises HostError when it is not installed."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as err:
        raise HostError(
            "cannot name system calls: libseccomp.so.2 does not load", hint="install the package libseccomp2"
        ) from err
    library.seccomp_syscall_resolve_name_arch.argtypes = (ctypes.c_uint32, ctypes.c_char_p)
    library.seccomp_syscall_resolve_name_arch.restype = ctypes.c_int
    library.seccomp_syscall_resolve_num_arch.argtypes = (ctypes.c_uint32, ctypes.c_int)
    library.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p  # char * of malloc: we free it
    library.seccomp_version.restype = ctypes.POINTER(ctypes.c_uint * 3)
    return library


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.free.restype = None
    return libc


def library_version() -> tuple[int, int, int]:
    """Return libseccomp's version, e.g. (2, 5, 4). Raises HostError when it is not installed."""
    major, minor, micro = libseccomp().seccomp_version().contents
    return major, minor, micro


def number_of(name: str, arch: str) -> int | None:
    """Return the number of system call `name` on `arch` ("x86_64" or "aarch64"); None if it has none there.

    Raises HostError for another architecture or without libseccomp. Calls that exist only elsewhere have
    negative pseudo numbers: seccomp_syscall_resolve_name(3).
    """
    number: int = libseccomp().seccomp_syscall_resolve_name_arch(_token(arch), name.encode())
    return number if number >= 0 else None


def name_of(number: int, arch: str) -> str | None:
    """Return the name of system call `number` on `arch`, or None. Raises as number_of."""
    address: int | None = libseccomp().seccomp_syscall_resolve_num_arch(_token(arch), number)
    if not address:
        return None
    try:
        return ctypes.string_at(address).decode("ascii")
    finally:
        _libc().free(address)


def all_names(arch: str) -> dict[str, int]:
    """Return every name that libseccomp knows on `arch`, with its number. Raises as number_of."""
    known = ((name_of(number, arch), number) for number in range(HIGHEST_NUMBER + 1))
    return {name: number for name, number in known if name}


def _token(arch: str) -> int:
    if arch not in AUDIT_ARCH:
        raise HostError(
            f"no table of system calls for architecture {arch!r}", hint=f"known: {', '.join(AUDIT_ARCH)}"
        )
    return AUDIT_ARCH[arch]
