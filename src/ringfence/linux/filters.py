"""A seccomp filter as the kernel takes it, compiled from the OCI object by the libseccomp of this machine.

At the other tiers the runtime does this; the agent of a microVM sets its job's filter itself.
Source: seccomp_init(3), seccomp_rule_add(3), seccomp_export_bpf(3).
"""

import ctypes
import os

from ringfence.errors import HostError, PolicyError
from ringfence.linux.syscalls import libseccomp

_ALLOW = 0x7FFF0000
_ACTIONS = {
    "SCMP_ACT_ALLOW": _ALLOW,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
}
_COMPARISONS = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_EPERM = 1
_MOST_BYTES = 4096 * 8  # seccomp(2): BPF_MAXINSNS instructions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("one", ctypes.c_uint64),
        ("two", ctypes.c_uint64),
    )


def compile_filter(oci: "Mapping[str, object]") -> bytes:
    """Return the program, an array of ``struct sock_filter``, of the OCI object `oci` (``linux.seccomp``).

    For the native ABI alone; calls of any other are killed. A call that this machine does not know is left out, as
    the runtimes do: nothing is allowed by that, as long as the default action does not allow.
    Raises PolicyError for an action that nobody would answer in a guest, HostError without libseccomp.
    """
    library = libseccomp()
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = (ctypes.c_uint32,)
    library.seccomp_release.argtypes = (ctypes.c_void_p,)
    library.seccomp_release.restype = None
    library.seccomp_rule_add_array.argtypes = (
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    )
    library.seccomp_export_bpf.argtypes = (ctypes.c_void_p, ctypes.c_int)
    default = _action(oci["defaultAction"], oci.get("defaultErrnoRet"))
    context = library.seccomp_init(default)
    if not context:
        raise HostError("libseccomp makes no filter", hint="is it a broken installation?")
    try:
        rules = oci["syscalls"]
        assert isinstance(rules, list)  # noqa: S101 - by the type of the plan's own object
        for rule in rules:
            _add(library, context, rule, default)
        return _exported(library, context)
    finally:
        library.seccomp_release(context)


def _action(name: object, number: object) -> int:
    if name not in _ACTIONS:
        raise PolicyError(
            f"the seccomp action {name} has nobody to answer it in a microVM",
            hint="use errno, kill, trap, log or allow",
        )
    value = _ACTIONS[str(name)]
    if name == "SCMP_ACT_ERRNO":
        value |= (number if isinstance(number, int) else _EPERM) & 0xFFFF
    return value


def _add(library: ctypes.CDLL, context: int, rule: "Mapping[str, object]", default: int) -> None:
    action = _action(rule["action"], rule.get("errnoRet"))
    if action == default:
        return  # libseccomp refuses what would change nothing
    names, arguments = rule["names"], rule.get("args") or []
    assert isinstance(names, list)  # noqa: S101 - by the type of the plan's own object
    assert isinstance(arguments, list)  # noqa: S101
    compared = (_Comparison * max(1, len(arguments)))(
        *(
            _Comparison(arg["index"], _COMPARISONS[arg["op"]], arg["value"], arg.get("valueTwo", 0))
            for arg in arguments
        )
    )
    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:
            continue
        failed = library.seccomp_rule_add_array(
            context, action, number, len(arguments), ctypes.addressof(compared)
        )
        if failed:
            raise PolicyError(
                f"the seccomp rule for {name} cannot be compiled: {os.strerror(-failed)}",
                hint="simplify the profile",
            )


def _exported(library: ctypes.CDLL, context: int) -> bytes:
    fd = os.memfd_create("filter", os.MFD_CLOEXEC)
    try:
        failed = library.seccomp_export_bpf(context, fd)
        size = os.fstat(fd).st_size
        if failed or not 0 < size <= _MOST_BYTES:
            raise PolicyError(
                f"the seccomp profile makes no filter that a kernel takes ({size} bytes)",
                hint="simplify the profile",
            )
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)
