"""The calls that are judged by their arguments: for each, rules that together cover its values.

Numbers are of the kernel's headers for 64-bit x86 and ARM, which agree on all of them. What is denied has
a rule of its own, so that it says EPERM and not the ENOSYS of a call that is not there.

An argument that the kernel reads as an int is compared in its low half alone where programs may leave
something in the upper half (flags, modes, ioctl commands). Numbers that come from constants (families,
protocols, personalities) are compared whole: anything in the upper half is then denied, and ranges make the
filter a quarter as long.
"""

from typing import TYPE_CHECKING

from ringfence.plan.seccomp_match import WHOLE, WHOLE_INT, beyond, complement, equals, fits

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from ringfence.plan.seccomp_match import Arg, Pattern, Rule

ALLOW = "SCMP_ACT_ALLOW"
ERRNO = "SCMP_ACT_ERRNO"
LETS_PASS = (ALLOW, "SCMP_ACT_LOG")
EPERM, ENOSYS = 1, 38  # asm-generic/errno.h

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16  # linux/socket.h
EITHER_INET = (WHOLE & ~(AF_INET ^ AF_INET6), AF_INET & AF_INET6)  # the two differ in one bit
NETLINK_ROUTE = 0  # linux/netlink.h
# linux/in.h, in6.h: "the usual one" (0), ICMP, TCP, UDP, ICMPv6. Many of the others load a kernel module.
INTERNET_PROTOCOLS = (0, 1, 6, 17, 58)

TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # asm-generic/ioctls.h
# asm-generic/ioctl.h: type and number are the low 16 bits, then a size, which needs a direction.
IOC_DIRECTION = 0xC000_0000
S_ISUID, S_ISGID = 0o4000, 0o2000  # linux/stat.h
PLAIN_MODE = (S_ISUID | S_ISGID, 0)
O_CREAT, O_TMPFILE_BIT = 0o100, 0o20000000  # asm-generic/fcntl.h
NOT_CREATING = (O_CREAT | O_TMPFILE_BIT, 0)
# linux/sched.h: NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET. NEWTIME (0x80) belongs to clone3
# and unshare alone: in clone's flags that bit is part of the exit signal.
CLONE_NEW = 0x7E02_0000
# linux/personality.h: PER_LINUX or PER_LINUX32 (8), with or without UNAME26; all ones only asks.
PLAIN_PERSONALITY = (WHOLE & ~(0x0008 | 0x0002_0000), 0)
ASK_PERSONALITY = WHOLE_INT
NO_FLAGS = (
    WHOLE & ~0x0003_FFFF,
    0,
)  # the rest is ADDR_NO_RANDOMIZE (1 << 18) and its kind

# linux/resource.h, linux/ioprio.h
PRIO_PROCESS, IOPRIO_WHO_PROCESS = 0, 1
OWN_PID = (
    "prlimit64",
    "sched_setscheduler",
    "sched_setparam",
    "sched_setattr",
)  # the pid is the first argument

MODE_ARGUMENT = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1, "mknod": 1, "mknodat": 2}
FLAGS_ARGUMENT = {"open": 1, "openat": 2}  # the mode follows the flags


def conditional_rules(wanted: "Collection[str]") -> "list[Rule]":
    """Return the rules of those conditional calls that are in `wanted`, in a fixed order."""
    rules = [
        *_socket(),
        *_judge("socketpair", [equals(0, AF_UNIX)], beyond(0, [(WHOLE, AF_UNIX)], bits=1)),
        *_ioctl(),
        *(rule for name, index in MODE_ARGUMENT.items() for rule in _mode(name, index)),
        *(rule for name, index in FLAGS_ARGUMENT.items() for rule in _open(name, index)),
        *clone_rules(),
        *(rule for name in OWN_PID for rule in _judge(name, [equals(0, 0)], [_above(0, 0)])),
        *_own("setpriority", PRIO_PROCESS),
        *_own("ioprio_set", IOPRIO_WHO_PROCESS),
        *_personality(),
    ]
    return [rule for rule in rules if rule["names"][0] in wanted]


def _own(name: str, which: int) -> "list[Rule]":
    """Allow a call (which, who, ...) for the caller alone: `which` says that `who` is a process, 0 itself."""
    allowed: Rule = {"names": [name], "action": ALLOW, "args": [equals(0, which), equals(1, 0)]}
    others = _judge(name, [], [_above(1, 0)], equals(0, which))
    return [allowed, *others, *_judge(name, [], _but(0, which))]


def _but(index: int, value: int) -> "list[Arg]":
    """Return the conditions that together hold for every register but `value`."""
    below: Arg = {"index": index, "value": value, "op": "SCMP_CMP_LT"}
    return [*([below] if value else []), _above(index, value)]


def _above(index: int, value: int) -> "Arg":
    return {"index": index, "value": value, "op": "SCMP_CMP_GT"}


def clone_rules() -> "list[Rule]":
    """Return the rules that allow clone(2) without any new namespace."""
    return _judge("clone", [fits(0, (CLONE_NEW, 0))], _misfits(0, (CLONE_NEW, 0)))


def plain(names: "Collection[str]", action: str, errno: int | None = None) -> "list[Rule]":
    """Return the one unconditional rule for `names`, sorted, or nothing when there are none."""
    rule: Rule = {"names": sorted(names), "action": action}
    if errno is not None:
        rule["errnoRet"] = errno
    return [rule] if names else []


def _judge(name: str, good: "Iterable[Arg]", bad: "Iterable[Arg]", *also: "Arg") -> "list[Rule]":
    """Allow `name` for each condition of `good` and deny it for each of `bad`, where `also` holds too."""
    allowed: list[Rule] = [{"names": [name], "action": ALLOW, "args": [*also, arg]} for arg in good]
    denied: list[Rule] = [
        {"names": [name], "action": ERRNO, "errnoRet": EPERM, "args": [*also, arg]} for arg in bad
    ]
    return allowed + denied


def _socket() -> "list[Rule]":
    families: Sequence[Pattern] = [(WHOLE, AF_UNIX), EITHER_INET, (WHOLE, AF_NETLINK)]
    protocols: Sequence[Pattern] = [(WHOLE, protocol) for protocol in INTERNET_PROTOCOLS]
    return [
        *_judge("socket", [equals(0, AF_UNIX)], beyond(0, families, bits=5)),
        *_judge(
            "socket", [fits(2, p) for p in protocols], beyond(2, protocols, bits=6), fits(0, EITHER_INET)
        ),
        *_judge("socket", [equals(2, NETLINK_ROUTE)], beyond(2, [(WHOLE, 0)], bits=0), equals(0, AF_NETLINK)),
    ]


def _ioctl() -> "list[Rule]":
    """Deny the two commands that type; others with their low 16 bits have a direction."""
    typing = [(IOC_DIRECTION | 0xFFFF, command) for command in (TIOCSTI, TIOCLINUX)]
    return _judge("ioctl", [fits(1, other) for other in complement(typing)], [fits(1, p) for p in typing])


def _mode(name: str, index: int, *also: "Arg") -> "list[Rule]":
    return _judge(name, [fits(index, PLAIN_MODE)], _misfits(index, PLAIN_MODE), *also)


def _open(name: str, flags: int) -> "list[Rule]":
    """Judge the mode of an open that creates; else the kernel ignores it, and the register holds anything."""
    creating = [rule for arg in _misfits(flags, NOT_CREATING) for rule in _mode(name, flags + 1, arg)]
    return [*_judge(name, [fits(flags, NOT_CREATING)], []), *creating]


def _personality() -> "list[Rule]":
    """Deny every flag, by blocks of values; what is no personality at all is left as ENOSYS."""
    *flagged, _ = beyond(0, [NO_FLAGS], bits=31)
    above_int: Arg = {"index": 0, "value": WHOLE_INT, "op": "SCMP_CMP_GT"}
    good = [fits(0, PLAIN_PERSONALITY), equals(0, ASK_PERSONALITY)]
    return _judge("personality", good, [*flagged, above_int])


def _misfits(index: int, pattern: "Pattern") -> "list[Arg]":
    return [fits(index, other) for other in complement([pattern])]
