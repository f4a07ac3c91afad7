"""What a whole policy must not say: fields that are right each for itself and contradict one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ringfence.errors import PolicyError
from ringfence.policy.document import Place
from ringfence.policy.model import TIERS, Policy
from ringfence.policy.units import format_size

# The fields that contradict each other, what is wrong, and what to do.
Contradiction = tuple[tuple[str, ...], str, str]


def check(policy: Policy, places: Mapping[str, Place], fixed: frozenset[str] = frozenset()) -> None:
    """Raise PolicyError for the first contradiction, at the place of the field that the user wrote.

    `fixed` are sources that users do not edit (presets): a place in one is named only when there is no other.
    """
    for rule in _RULES:
        for keys, message, hint in rule(policy):
            placed = [key for key in keys if key in places]
            edited = [key for key in placed if places[key].source not in fixed]
            key = (*edited, *placed, *keys)[0]
            at = f"{places[key]}: " if key in places else ""
            raise PolicyError(f"{at}{key}: {message}", hint=hint)


def _floor(policy: Policy) -> Iterator[Contradiction]:
    if policy.isolation != "auto" and TIERS.index(policy.isolation) < TIERS.index(policy.floor):
        yield (
            ("isolation", "floor"),
            f"isolation {policy.isolation} is weaker than floor {policy.floor}",
            f"use isolation {policy.floor} or auto, or lower the floor",
        )


def _threads(policy: Policy) -> Iterator[Contradiction]:
    limits = policy.limits
    if limits.pids is not None and limits.threads is not None and limits.threads > limits.pids:
        yield (
            ("limits.threads", "limits.pids"),
            f"threads {limits.threads} can never be reached with pids {limits.pids}",
            f"set limits.threads to {limits.pids} or less, or raise limits.pids",
        )


def _swap(policy: Policy) -> Iterator[Contradiction]:
    limits = policy.limits
    if limits.memory_bytes is None and limits.swap_bytes is not None:
        yield (
            ("limits.memory", "limits.swap"),
            f"swap {format_size(limits.swap_bytes)} is counted beyond the memory limit, and there is none",
            "set limits.memory, or limits.swap to null",
        )


def _network(policy: Policy) -> Iterator[Contradiction]:
    network = policy.network
    if network.allow and network.mode != "egress":
        yield (
            ("network.allow", "network.mode"),
            f"allow lists {network.allow[0]} but network.mode is {network.mode}",
            "set network.mode to egress, or empty the list",
        )
    if network.publish and network.mode == "none":
        yield (
            ("network.publish", "network.mode"),
            f"publish lists {network.publish[0]} but network.mode is none",
            "set network.mode to ports or egress, or empty the list",
        )
    ends = [entry.rsplit(":", 1)[0] for entry in network.publish]
    for end in ends:
        if ends.count(end) > 1:
            yield (("network.publish",), f"{end} is published twice", "give each its own host port")


def _mounts(policy: Policy) -> Iterator[Contradiction]:
    targets = [mount.target for mount in policy.filesystem.mounts]
    for target in targets:
        if targets.count(target) > 1:
            yield (("filesystem.mounts",), f"two mounts cover {target}", "remove one of them")


_RULES = (_floor, _threads, _swap, _network, _mounts)
