"""What one policy permits that another does not, in words.

Every field has an entry in `COMPARE`, which knows which way is wider. What has no order (another seccomp
file, another mount source) is said to change, and counts as wider: nobody has shown that it is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, cast

import msgspec

from ringfence.policy.dump import plain_value
from ringfence.policy.fields import FIELDS, value_of
from ringfence.policy.model import TIERS, Mount, Policy, user_ids

Direction = Literal["widens", "narrows", "changes"]
Said = tuple[Direction, str]
Comparison = Callable[[Policy, Policy, str], Iterator[Said]]


class Change(msgspec.Struct, frozen=True):
    """One difference: the dotted field, which way it goes, and what a person should know."""

    field: str
    direction: Direction
    words: str


def diff(a: Policy, b: Policy) -> tuple[Change, ...]:
    """Return how `b` differs from `a`, in the order of the fields; empty when they permit the same."""
    return tuple(
        Change(key, direction, words) for key in FIELDS for direction, words in COMPARE[key](a, b, key)
    )


def widens(changes: tuple[Change, ...]) -> bool:
    """Return whether anything became wider, or might have."""
    return any(change.direction != "narrows" for change in changes)


def _amount(phrase: str, boundless: str) -> Comparison:
    """Compare numbers where more is wider and None is the widest."""

    def compare(a: Policy, b: Policy, key: str) -> Iterator[Said]:
        old, new = _number(value_of(a, key)), _number(value_of(b, key))
        if old != new:
            texts = [boundless if (text := plain_value(p, key)) is None else str(text) for p in (b, a)]
            words = f"{phrase.format(texts[0])} instead of {texts[1]}"
            yield ("widens" if new > old else "narrows"), words

    return compare


def _ranked(**words: str) -> Comparison:
    """Compare words given from the narrowest to the widest, and say what the new one means."""
    order = [name.replace("_", "-") for name in words]

    def compare(a: Policy, b: Policy, key: str) -> Iterator[Said]:
        old, new = order.index(_word(a, key)), order.index(_word(b, key))
        if old != new:
            yield ("widens" if new > old else "narrows"), list(words.values())[new]

    return compare


def _members(gained: str, lost: str) -> Comparison:
    """Compare lists of permissions: each one more is wider."""

    def compare(a: Policy, b: Policy, key: str) -> Iterator[Said]:
        old, new = _texts(a, key), _texts(b, key)
        for text in new:
            if text not in old:
                yield "widens", gained.format(text)
        for text in old:
            if text not in new:
                yield "narrows", lost.format(text)

    return compare


def _isolation(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    def rank(policy: Policy) -> tuple[int, bool]:
        # `auto` starts at the floor and may go higher; a named tier never does.
        auto = policy.isolation == "auto"
        return TIERS.index(policy.floor if policy.isolation == "auto" else policy.isolation), auto

    if a.isolation != b.isolation:
        direction: Direction = "widens" if rank(b) < rank(a) else "narrows"
        yield direction, f"runs in isolation {b.isolation} instead of {a.isolation}"


def _floor(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    old, new = TIERS.index(a.floor), TIERS.index(b.floor)
    if old != new:
        yield (
            ("widens" if new < old else "narrows"),
            f"needs at least isolation {b.floor} instead of {a.floor}",
        )


def _user(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    def privilege(policy: Policy) -> int:
        # Root can do the most inside, its group some of that; ordinary users are not above one another.
        uid, gid = user_ids(policy.user) or (1, 1)
        return 2 if uid == 0 else 1 if gid == 0 else 0

    if a.user != b.user:
        more = privilege(b) - privilege(a)
        direction: Direction = "widens" if more > 0 else "narrows" if more < 0 else "changes"
        yield direction, f"runs as {_user_words(b.user)} instead of {_user_words(a.user)}"


def _user_words(user: str) -> str:
    ids = user_ids(user)
    if ids is None:
        return "a dedicated user"
    return f"root inside ({user})" if ids[0] == 0 else f"user {user} inside"


def _no_new_privileges(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    if a.no_new_privileges and not b.no_new_privileges:
        yield "widens", "may gain privileges from set-user-ID programs"
    if b.no_new_privileges and not a.no_new_privileges:
        yield "narrows", "may no longer gain privileges from set-user-ID programs"


def _seccomp(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    if a.seccomp == b.seccomp:
        return
    known = {("strict", "default"): "widens", ("default", "strict"): "narrows"}
    direction = cast("Direction", known.get((a.seccomp, b.seccomp), "changes"))
    yield direction, f"is filtered by seccomp profile {b.seccomp} instead of {a.seccomp}"


def _sysfs(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    if a.filesystem.sysfs != b.filesystem.sysfs:
        wider = b.filesystem.sysfs
        yield ("widens", "sees /sys") if wider else ("narrows", "no longer sees /sys")


def _mounts(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    old = {mount.target: mount for mount in a.filesystem.mounts}
    new = {mount.target: mount for mount in b.filesystem.mounts}
    for target, mount in new.items():
        if target not in old:
            yield "widens", f"sees host path {mount.source} at {target}, {_mode(mount)}"
        elif mount != old[target]:
            yield from _mount_changes(old[target], mount)
    for target, mount in old.items():
        if target not in new:
            yield "narrows", f"no longer sees host path {mount.source} at {target}"


def _mount_changes(old: Mount, new: Mount) -> Iterator[Said]:
    if old.source != new.source:
        yield "changes", f"sees host path {new.source} instead of {old.source} at {new.target}"
    if old.mode != new.mode:
        yield (
            ("widens" if new.mode == "rw" else "narrows"),
            f"has {new.target} {_mode(new)} instead of {_mode(old)}",
        )
    if old.allow_dangerous != new.allow_dangerous:
        may = "may now" if new.allow_dangerous else "may no longer"
        yield (
            ("widens" if new.allow_dangerous else "narrows"),
            f"{new.target} {may} show a dangerous host path",
        )


def _mode(mount: Mount) -> str:
    return "writable" if mount.mode == "rw" else "read-only"


def _network_mode(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    old, new = a.network.mode, b.network.mode
    words = {
        "none": "has no network",
        "egress": "may open connections to what is allowed",
        "ports": "may be reached at published ports",
    }
    if old != new:
        direction: Direction = "widens" if old == "none" else "narrows" if new == "none" else "changes"
        yield direction, f"{words[new]}; before, it {words[old]}"


def _cpuset(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    old, new = _cpus(a.limits.cpuset), _cpus(b.limits.cpuset)
    if old != new:
        wider = new is None or (old is not None and new > old)
        narrower = old is None or (new is not None and new < old)
        direction: Direction = "widens" if wider else "narrows" if narrower else "changes"
        words = [f"CPUs {cpuset}" if cpuset else "all CPUs" for cpuset in (b.limits.cpuset, a.limits.cpuset)]
        yield direction, f"may use {words[0]} instead of {words[1]}"


def _cpus(cpuset: str | None) -> frozenset[int] | None:
    if cpuset is None:
        return None
    ends = [part.split("-") for part in cpuset.split(",")]
    return frozenset(cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1))


def _sysctls(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    for name in sorted({*a.sysctls, *b.sysctls}):
        old, new = a.sysctls.get(name), b.sysctls.get(name)
        if new is None:
            yield "changes", f"no longer sets kernel parameter {name}, which was {old}"
        elif old != new:
            yield "changes", f"sets kernel parameter {name} to {new}" + (f" instead of {old}" if old else "")


def _digest_required(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    if a.image.digest_required and not b.image.digest_required:
        yield "widens", "may be an image named without a digest"
    if b.image.digest_required and not a.image.digest_required:
        yield "narrows", "must be an image named with its digest"


def _registries(a: Policy, b: Policy, key: str) -> Iterator[Said]:
    old, new = a.image.allowed_registries, b.image.allowed_registries
    if old is None and new is not None:
        yield "narrows", f"may be an image only from {', '.join(new) or 'nowhere'}"
    elif new is None and old is not None:
        yield "widens", "may be an image from anywhere"
    elif old is not None and new is not None:
        yield from _members("may be an image from {}", "may no longer be an image from {}")(a, b, key)


def _signatures(a: Policy, b: Policy, _key: str) -> Iterator[Said]:
    old, new = a.image.signatures, b.image.signatures
    if old != new:
        words = [path or "this host's own policy.json" for path in (new, old)]
        yield "changes", f"needs an image that {words[0]} lets in, instead of {words[1]}"


def _number(value: object) -> float:
    return float("inf") if value is None else msgspec.convert(value, float)


def _word(policy: Policy, key: str) -> str:
    return msgspec.convert(value_of(policy, key), str)


def _texts(policy: Policy, key: str) -> tuple[str, ...]:
    return msgspec.convert(value_of(policy, key), tuple[str, ...])


COMPARE: dict[str, Comparison] = {
    "isolation": _isolation,
    "floor": _floor,
    "user": _user,
    "capabilities": _members("gains capability {}", "loses capability {}"),
    "no_new_privileges": _no_new_privileges,
    "seccomp": _seccomp,
    "lsm": _ranked(
        required="needs a host with AppArmor or SELinux",
        default="gets an AppArmor or SELinux label only where the host has one",
        none="runs without an AppArmor or SELinux label",
    ),
    "filesystem.root": _ranked(
        read_only="may no longer write to the root filesystem", writable="may write to the root filesystem"
    ),
    "filesystem.tmp": _amount("may fill /tmp with {}", "any amount"),
    "filesystem.sysfs": _sysfs,
    "filesystem.mounts": _mounts,
    "network.mode": _network_mode,
    "network.allow": _members("may connect to {}", "may no longer connect to {}"),
    "network.publish": _members("is reachable from {}", "is no longer reachable from {}"),
    "devices": _members("may open device {}", "may no longer open device {}"),
    "limits.memory": _amount("may use {} of memory", "any amount"),
    "limits.swap": _amount("may use {} of swap", "any amount"),
    "limits.cpus": _amount("may use {} CPU", "any amount of"),
    "limits.cpu_weight": _amount("has CPU weight {}", ""),
    "limits.cpuset": _cpuset,
    "limits.pids": _amount("may have {} processes and threads in all", "any number of"),
    "limits.stack": _amount("may use {} of stack", ""),
    "limits.threads": _amount("may have {} processes and threads of its user", "any number of"),
    "limits.open_files": _amount("may open {} files", ""),
    "limits.file_size": _amount("may write files of {}", "any size"),
    "limits.disk": _amount("may write {} to disk", ""),
    "limits.inodes": _amount("may create {} files", ""),
    "limits.shm": _amount("may use {} of shared memory", ""),
    "limits.io.read": _amount("may read {} from block devices", "any amount"),
    "limits.io.write": _amount("may write {} to block devices", "any amount"),
    "limits.io.read_iops": _amount("may read {} times a second from block devices", "any number of"),
    "limits.io.write_iops": _amount("may write {} times a second to block devices", "any number of"),
    "limits.time": _amount("may run for {}", "any time"),
    "limits.output": _amount("may print {}", "any amount"),
    "sysctls": _sysctls,
    "secrets": _members("may use secret {}", "may no longer use secret {}"),
    "image.digest_required": _digest_required,
    "image.allowed_registries": _registries,
    "image.signatures": _signatures,
    "host.smt": _ranked(
        refused="needs a host without simultaneous multithreading",
        allowed="may run on a host with simultaneous multithreading",
    ),
    "host.ksm": _ranked(
        refused="needs a host that does not merge memory pages",
        allowed="may run on a host that merges memory pages",
    ),
    "host.cpu_mitigations": _ranked(
        required="needs a host whose CPU vulnerabilities are all mitigated",
        any="may run on a host with unmitigated CPU vulnerabilities",
    ),
}
