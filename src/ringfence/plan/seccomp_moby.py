"""Reading somebody's own profile: the JSON format of moby, which Docker and Podman ship and take.

It is read for this machine's ABI, the policy's capabilities and the kernel, as dockerd reads it, and then
reduced: what no sandbox gets (NEVER, new namespaces) is taken out. Calls unknown to the local libseccomp
are left in; crun and runc skip them, and as only profiles that deny by default are accepted, skipping
never allows anything.
"""

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from ringfence.errors import PolicyError
from ringfence.plan import seccomp_calls as calls
from ringfence.plan.seccomp_match import SCMP_ARCH, WHOLE, Arg, LinuxSeccomp, Operator, fits
from ringfence.plan.seccomp_rules import CLONE_NEW, ENOSYS, ERRNO, LETS_PASS

if TYPE_CHECKING:
    from collections.abc import Collection

    from ringfence.plan.seccomp_match import Rule

LARGEST_BYTES = 1 << 20
GOARCH = {"x86_64": "amd64", "aarch64": "arm64"}
NEVER = calls.names(calls.NEVER) | {"clone3"}

Denial = Literal[
    "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP"
]
Action = Literal[Denial, "SCMP_ACT_ALLOW", "SCMP_ACT_LOG"]
ErrorNumber = Annotated[int, msgspec.Meta(ge=0, le=4095)]
CallName = Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]{1,64}$")]
KernelVersion = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")]
# asm-generic/errno-base.h and errno.h
ERRNO_NAMES = {"EPERM": 1, "ENOENT": 2, "EACCES": 13, "EINVAL": 22, "ENOSYS": 38, "EAFNOSUPPORT": 97}
ErrnoName = Literal["EPERM", "ENOENT", "EACCES", "EINVAL", "ENOSYS", "EAFNOSUPPORT"]


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class _Condition(_Struct, frozen=True):
    index: Annotated[int, msgspec.Meta(ge=0, le=5)]
    value: int
    op: Operator
    valueTwo: int = 0  # noqa: N815 - the format's own word, as below


class _When(_Struct, frozen=True):
    caps: tuple[str, ...] | None = None
    arches: tuple[str, ...] | None = None
    minKernel: KernelVersion | None = None  # noqa: N815


class _Syscalls(_Struct, frozen=True):
    action: Action
    names: tuple[CallName, ...] | None = None
    name: CallName | Literal[""] = ""
    errnoRet: ErrorNumber | None = None  # noqa: N815
    errno: ErrnoName | None = None
    args: tuple[_Condition, ...] | None = None
    comment: str | None = None
    includes: _When | None = None
    excludes: _When | None = None


class _ArchMap(_Struct, frozen=True):
    architecture: str
    subArchitectures: tuple[str, ...] | None = None  # noqa: N815


class _Profile(_Struct, frozen=True):
    defaultAction: Action  # noqa: N815
    defaultErrnoRet: ErrorNumber | None = None  # noqa: N815
    defaultErrno: ErrnoName | None = None  # noqa: N815
    archMap: tuple[_ArchMap, ...] | None = None  # noqa: N815
    architectures: tuple[str, ...] | None = None
    flags: tuple[Literal["SECCOMP_FILTER_FLAG_LOG"], ...] | None = None
    syscalls: tuple[_Syscalls, ...] | None = None


class _Meaning(msgspec.Struct, frozen=True):
    """What one entry says of one call; without args it says so always."""

    action: str
    errno: int | None
    args: list[Arg]

    @property
    def passes(self) -> bool:
        return self.action in LETS_PASS

    @property
    def outcome(self) -> tuple[str, int]:
        return self.action, -1 if self.errno is None else self.errno


_Meanings = dict[str, list[_Meaning]]


def read_profile(
    data: bytes, *, source: str, arch: str, capabilities: "Collection[str]", kernel: tuple[int, int]
) -> tuple[LinuxSeccomp, frozenset[str]]:
    """Return the filter that the profile `data` means here, and the calls it allows more of.

    `source` names the profile in errors. Raises PolicyError when it is too large, not of the format, made for
    other machines, allows by default, or depends on an order of rules that libseccomp does not keep.
    Source of the format: moby, profiles/seccomp/seccomp.go; Podman's copy adds `errno` and `defaultErrno`.
    """
    profile = _decode(data, source)
    if profile.defaultAction in LETS_PASS:
        raise PolicyError(
            f"{source}: defaultAction {profile.defaultAction} is no filter: what has no rule is allowed",
            hint='set "defaultAction": "SCMP_ACT_ERRNO" and list what to allow',
        )
    if profile.architectures and SCMP_ARCH[arch] not in profile.architectures:
        raise PolicyError(
            f"{source}: made for {', '.join(profile.architectures)}, not for {SCMP_ARCH[arch]}",
            hint="add it to architectures, or remove that key",
        )
    meanings: _Meanings = {}
    for number, entry in enumerate(profile.syscalls or ()):
        if _applies(entry, GOARCH[arch], capabilities, kernel):
            _add(meanings, entry, f"{source}: syscalls[{number}]")
    reduced = _reduce(meanings, source)
    oci: LinuxSeccomp = {
        "defaultAction": profile.defaultAction,
        "architectures": [SCMP_ARCH[arch]],
        "flags": list(profile.flags or ()),
        "syscalls": _rules({name: _settle(name, known, source) for name, known in meanings.items()}),
    }
    if profile.defaultAction == ERRNO:
        oci["defaultErrnoRet"] = _errno(profile.defaultErrnoRet, profile.defaultErrno, f"{source}: default")
    return oci, reduced


def _decode(data: bytes, source: str) -> _Profile:
    if len(data) > LARGEST_BYTES:
        raise PolicyError(f"{source}: {len(data)} bytes, a seccomp profile may have {LARGEST_BYTES}")
    try:
        return msgspec.json.decode(data, type=_Profile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise PolicyError(
            f"{source}: not a usable seccomp profile: {err}",
            hint="the format is moby's; TRACE and NOTIFY need a supervisor and are not accepted",
        ) from err


def _applies(entry: _Syscalls, goarch: str, capabilities: "Collection[str]", kernel: tuple[int, int]) -> bool:
    """Includes must all hold, and one exclude is enough to drop the entry."""
    only, never = entry.includes or _When(), entry.excludes or _When()
    return not (
        (never.arches and goarch in never.arches)
        or any(cap in capabilities for cap in never.caps or ())
        or (never.minKernel and kernel >= _version(never.minKernel))
        or (only.arches and goarch not in only.arches)
        or any(cap not in capabilities for cap in only.caps or ())
        or (only.minKernel and kernel < _version(only.minKernel))
    )


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def _errno(number: int | None, name: str | None, place: str) -> int:
    if number is not None and name is not None and number != ERRNO_NAMES[name]:
        raise PolicyError(f"{place}: errno {name} and errnoRet {number} disagree", hint="keep one of them")
    return number if number is not None else ERRNO_NAMES[name or "EPERM"]


def _add(meanings: _Meanings, entry: _Syscalls, place: str) -> None:
    if entry.names and entry.name:
        raise PolicyError(f"{place}: has both name and names", hint="keep names")
    errno = _errno(entry.errnoRet, entry.errno, place) if entry.action == ERRNO else None
    args = [_arg(condition, place) for condition in entry.args or ()]
    for name in entry.names or ((entry.name,) if entry.name else ()):
        known = meanings.setdefault(name, [])
        known.extend(_Meaning(entry.action, errno, group) for group in _as_runtimes_do(args))


def _arg(condition: _Condition, place: str) -> Arg:
    if not (0 <= condition.value <= WHOLE and 0 <= condition.valueTwo <= WHOLE):
        raise PolicyError(f"{place}: value and valueTwo must be 64-bit numbers without sign")
    arg: Arg = {"index": condition.index, "value": condition.value, "op": condition.op}
    if condition.op == "SCMP_CMP_MASKED_EQ":
        arg["valueTwo"] = condition.valueTwo
    return arg


def _as_runtimes_do(args: list[Arg]) -> list[list[Arg]]:
    """All conditions must hold; but of two about one argument crun and runc take either."""
    repeated = len({arg["index"] for arg in args}) < len(args)
    return [[arg] for arg in args] if repeated else [args]


def _reduce(meanings: _Meanings, source: str) -> frozenset[str]:
    """Take out of `meanings` what no sandbox gets, and return the names that lost something."""
    before = dict(meanings)
    for name in NEVER & meanings.keys():
        meanings[name] = [meaning for meaning in meanings[name] if not meaning.passes]
    if meanings.get("clone3") != before.get(
        "clone3"
    ):  # its flags are behind a pointer: ENOSYS sends libc to clone
        meanings["clone3"] = [_Meaning(ERRNO, ENOSYS, [])]
    if "clone" in meanings:
        meanings["clone"] = [narrow for wide in meanings["clone"] for narrow in _no_namespaces(wide, source)]
    return frozenset(name for name, known in before.items() if known != meanings[name])


def _no_namespaces(wide: _Meaning, source: str) -> list[_Meaning]:
    """Return what allows clone(2) with "and no CLONE_NEW* flag" added, nothing if it asks for such a flag."""
    flags = next((arg for arg in wide.args if arg["index"] == 0), None)
    mask, value = _pattern(flags, source) if wide.passes else (CLONE_NEW, 0)
    if value & CLONE_NEW:
        return []
    if mask & CLONE_NEW == CLONE_NEW:
        return [wide]
    others = [arg for arg in wide.args if arg["index"] != 0]
    return [_Meaning(wide.action, wide.errno, [fits(0, (mask | CLONE_NEW, value)), *others])]


def _pattern(flags: Arg | None, source: str) -> tuple[int, int]:
    """Return the (mask, value) that clone's flags must fit; anything fits (0, 0)."""
    if flags is None:
        return 0, 0
    if flags["op"] == "SCMP_CMP_EQ":
        return WHOLE, flags["value"]
    if flags["op"] == "SCMP_CMP_MASKED_EQ":
        return flags["value"], flags.get("valueTwo", 0)
    raise PolicyError(
        f"{source}: clone's flags are compared by {flags['op']}, which new namespaces may pass",
        hint="use SCMP_CMP_MASKED_EQ, or allow clone without args",
    )


def _settle(name: str, known: list[_Meaning], source: str) -> list[_Meaning]:
    """Return the rules of one call as libseccomp can keep them: one unconditional, or only conditional."""
    always = sorted((meaning for meaning in known if not meaning.args), key=lambda m: (m.passes, m.outcome))
    if not always:
        return known
    first = always[0]  # denials come first: they are the safe reading of two that disagree
    if first.passes and any(other.outcome != first.outcome for other in known):
        raise PolicyError(
            f"{source}: {name} is allowed always and otherwise for some arguments, which libseccomp drops",
            hint="allow it for the other arguments only",
        )
    return [first]


def _rules(meanings: _Meanings) -> "list[Rule]":
    """Return the rules in a fixed order: the unconditional ones by outcome, then the others by name."""
    always: dict[tuple[str, int], list[str]] = {}
    rules: list[Rule] = []
    for name in sorted(meanings):
        for meaning in meanings[name]:
            if meaning.args:
                rules.append({**_action(meaning.outcome, [name]), "args": meaning.args})
            else:
                always.setdefault(meaning.outcome, []).append(name)
    return [*(_action(outcome, names) for outcome, names in sorted(always.items())), *rules]


def _action(outcome: tuple[str, int], names: list[str]) -> "Rule":
    action, errno = outcome
    rule: Rule = {"names": names, "action": action}
    if errno >= 0:
        rule["errnoRet"] = errno
    return rule
