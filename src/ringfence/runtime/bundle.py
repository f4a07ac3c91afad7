"""From a plan to the ``config.json`` of one sandbox."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Plan
    from ringfence.plan.oci import OciConfig
    from ringfence.runtime.base import Instance


def instantiate(plan: Plan, instance: Instance, *, root: str, userns: str) -> OciConfig:
    """Return the plan's OCI object with the instance's name, ids and cgroup filled in; the plan is not changed.

    `root` is where the staged root is mounted, `userns` the path of the user namespace to join.
    """
    oci = plan["oci"]
    linux = oci["linux"]
    namespaces = [
        {**space, "path": userns} if space["type"] == "user" else space for space in linux["namespaces"]
    ]
    return {
        **oci,
        "root": {**oci["root"], "path": root},
        "hostname": instance.id,
        "linux": {
            **linux,
            "namespaces": namespaces,  # type: ignore[typeddict-item]
            "uidMappings": [{**mapping, "hostID": instance.base} for mapping in linux["uidMappings"]],
            "gidMappings": [{**mapping, "hostID": instance.base} for mapping in linux["gidMappings"]],
            "cgroupsPath": instance.cgroup_path,
        },
    }
