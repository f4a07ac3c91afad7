"""Where control groups are on this host: v1, v2 or both beside each other, behind one small class."""

from __future__ import annotations

from ringfence.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")
_ID_LENGTH = 64
# The group, beside `Layout.base`, into which a caller in a delegated v2 scope moves itself.
CALLER_LEAF = "ringfence-caller"


class Layout:
    """Mount points and the base group of all sandboxes; made from the host's facts, kept as JSON in a plan.

    `version` is "v1", "v2", "hybrid" or "none"; `mounts` maps v1 controllers to mount points; `unified` is
    the v2 mount point or ""; `controllers` are those to use; `base` is a path in every hierarchy.
    """

    __slots__ = ("base", "controllers", "mounts", "unified", "version")

    def __init__(
        self,
        version: str,
        *,
        mounts: Mapping[str, str],
        unified: str = "",
        controllers: tuple[str, ...] = (),
        base: str = "/ringfence",
    ) -> None:
        """Take facts as they are; nothing is read. Raises HostError for a `base` that is no plain path."""
        self.version = version
        self.mounts = dict(mounts)
        self.unified = unified
        self.controllers = tuple(controllers)
        self.base = "/" + "/".join(components(base))

    @classmethod
    def from_dict(cls, facts: Mapping[str, object]) -> Layout:
        """Return the layout in `facts`, a JSON object with at least the five names; others are ignored.

        Raises HostError when a value has the wrong type: the object may come from a file.
        """
        mounts, controllers = facts.get("mounts"), facts.get("controllers")
        if not isinstance(mounts, dict) or not isinstance(controllers, list | tuple):
            raise HostError(
                "the stored cgroup layout is damaged", hint="remove the cached plan and run again"
            )
        return cls(
            str(facts.get("version")),
            mounts={str(name): str(mount) for name, mount in mounts.items()},
            unified=str(facts.get("unified", "")),
            controllers=tuple(str(name) for name in controllers),
            base=str(facts.get("base", "/ringfence")),
        )

    def as_dict(self) -> dict[str, object]:
        """Return plain data for JSON; `from_dict` takes it back."""
        return {
            "version": self.version,
            "mounts": self.mounts,
            "unified": self.unified,
            "controllers": list(self.controllers),
            "base": self.base,
        }

    def path(self, sandbox_id: str) -> str:
        """Return the group of one sandbox, e.g. "/ringfence/a1b2"; also what the OCI ``cgroupsPath`` says."""
        return f"{self.base}/{valid_id(sandbox_id)}"

    def mount_of(self, controller: str) -> str:
        """Return the mount point of the hierarchy that has `controller`, or "" when there is none.

        The empty name means the core files (cpu.stat, cgroup.freeze), which only v2 has.
        """
        if self.version == "v2":
            return self.unified if controller in ("", *self.controllers) else ""
        return self.mounts.get(controller, "")

    def hierarchies(self) -> list[str]:
        """Return every mount point in which a sandbox may have a group, each once, in a fixed order."""
        # Hybrid: the v2 mount comes last and only for tidying up; runc makes a group there as well.
        places = [*(self.mounts[name] for name in sorted(self.mounts)), self.unified]
        return [place for place in dict.fromkeys(places) if place]


def components(path: str) -> list[str]:
    """Split an absolute cgroup `path`; raises HostError when it could leave its hierarchy."""
    if not path.startswith("/") or "\0" in path:
        raise HostError(f"cgroup path {path!r} is not absolute")
    parts = [part for part in path.split("/") if part]
    if not parts or ".." in parts or "." in parts:
        raise HostError(f"cgroup path {path!r} does not name a group of its own")
    return parts


def valid_id(sandbox_id: str) -> str:
    """Return `sandbox_id` when it is made of [a-z0-9-] and at most 64 long; raises HostError otherwise."""
    if not sandbox_id or len(sandbox_id) > _ID_LENGTH or not _ID_CHARACTERS.issuperset(sandbox_id):
        raise HostError(
            f"sandbox id {sandbox_id!r} is not made of a-z, 0-9 and '-', at most {_ID_LENGTH} of them"
        )
    return sandbox_id
