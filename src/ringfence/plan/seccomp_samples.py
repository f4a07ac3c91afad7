"""A few system calls whose answer the proof asks of the filter that the kernel really holds."""

from errno import errorcode

from ringfence.linux.syscalls import AUDIT_ARCH, number_of
from ringfence.plan.document import FilterSample
from ringfence.plan.seccomp_match import LinuxSeccomp, decide

_AF_VSOCK, _SOCK_STREAM, _SIGCHLD, _TIOCSTI, _CLONE_NEWUSER = 40, 1, 17, 0x5412, 0x10000000
# What most escapes of the past went through, what a job cannot do without, and what no kernel has.
_CALLS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    ("read", "read", ()),
    ("unshare(NEWUSER)", "unshare", (_CLONE_NEWUSER,)),
    ("clone(NEWUSER)", "clone", (_CLONE_NEWUSER | _SIGCHLD,)),
    ("setns", "setns", ()),
    ("mount", "mount", ()),
    ("bpf", "bpf", ()),
    ("keyctl", "keyctl", ()),
    ("socket(VSOCK)", "socket", (_AF_VSOCK, _SOCK_STREAM, 0)),
    ("ioctl(TIOCSTI)", "ioctl", (0, _TIOCSTI)),
)


def samples(oci: LinuxSeccomp, arch: str) -> tuple[list[FilterSample], list[str]]:
    """Return the calls to try on the kernel's filter, and the answer that `oci` asks for each, in words.

    Raises HostError without libseccomp.
    """
    tried: list[FilterSample] = []
    asked: list[str] = []
    for shown, name, args in _CALLS:
        number = number_of(name, arch)
        if number is None:  # not on this architecture
            continue
        tried.append({"call": shown, "number": number, "arch": AUDIT_ARCH[arch], "args": list(args)})
        asked.append(f"{shown} {_in_words(*decide(oci, name, args))}")
    return tried, asked


def _in_words(action: str, errno: int) -> str:
    if action == "SCMP_ACT_ERRNO":
        return errorcode.get(errno, f"errno {errno}")
    return {"SCMP_ACT_ALLOW": "allowed"}.get(action, action.removeprefix("SCMP_ACT_").lower())
