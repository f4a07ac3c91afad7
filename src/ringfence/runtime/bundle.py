"""From a plan to the ``config.json`` of one sandbox, and to the command line that runs it."""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.plainjson import dumps

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Plan
    from ringfence.plan.oci import OciConfig
    from ringfence.runtime.base import Instance


# Stands in a plan for the sandbox's staging directory: ringfence.plan.config.
STAGE = "@STAGE@"


def instantiate(plan: Plan, instance: Instance, *, userns: str) -> OciConfig:
    """Return the plan's OCI object with the instance's name, ids and cgroup filled in; the plan is not changed.

    `userns` is the path of the user namespace to join.
    """
    oci = plan["oci"]
    linux = oci["linux"]
    namespaces = [
        {**space, "path": userns} if space["type"] == "user" else space for space in linux["namespaces"]
    ]
    made: OciConfig = {
        **oci,
        "root": {**oci["root"], "path": f"{instance.staging}/root"},
        "hostname": instance.id,
        "mounts": [
            {**mount, "source": mount["source"].replace(STAGE, instance.staging)} for mount in oci["mounts"]
        ],
        "linux": {
            **linux,
            "namespaces": namespaces,  # type: ignore[typeddict-item]
            "uidMappings": [{**mapping, "hostID": instance.base} for mapping in linux["uidMappings"]],
            "gidMappings": [{**mapping, "hostID": instance.base} for mapping in linux["gidMappings"]],
            "cgroupsPath": instance.cgroup_path,
        },
    }
    if plan["guest"] is not None:
        from ringfence.runtime.door import arguments

        # The whole staging directory is the ring's root: the job's is one directory in it.
        made["root"]["path"] = instance.staging
        made["process"] = {**oci["process"], "args": arguments(plan, plan["guest"], instance)}
    if plan["machine"] is not None:
        from ringfence.runtime.bridge import arguments as bridge_arguments

        made["root"]["path"] = instance.staging
        made["process"] = {**oci["process"], "args": bridge_arguments(plan, plan["machine"], instance)}
    return made


def write_config(plan: Plan, instance: Instance, *, userns: str) -> None:
    """Write the bundle's config.json, and the guest's beside its root. Raises HostError when the disk is full."""
    oci = instantiate(plan, instance, userns=userns)
    _write(f"{instance.directory}/config.json", dumps(oci).encode(), 0o600)
    guest = plan["guest"]
    if guest is not None:
        # Readable: the ring's root is another user than we are. It holds nothing that a plan does not show.
        inner: OciConfig = {**guest["oci"], "hostname": instance.id}
        _write(f"{instance.staging}/bundle/config.json", dumps(inner).encode(), 0o644)
    machine = plan["machine"]
    if machine is not None:
        lines = [f"hostname={instance.id}", *machine["setup"]]
        text = "".join(f"{line}\0" for line in lines).encode("utf-8", "surrogateescape")
        _write(f"{instance.staging}/setup", text, 0o644)


def _write(path: str, content: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, mode)
        try:
            data = memoryview(content)
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(
            f"cannot write {path}: {error.strerror}",
            hint="free some space there, or set RINGFENCE_RUN_DIR",
        ) from error


def command(plan: Plan, instance: Instance, *, preserve: int, options: tuple[str, ...] = ()) -> list[str]:
    """Return the runtime's command line: start the agent, hand it `preserve` descriptors, and go away."""
    return [
        plan["runtime"]["path"],
        "--root",
        f"{instance.directory}/runtime",
        *options,
        "run",
        "--detach",
        "--preserve-fds",
        str(preserve),
        *(("--pid-file", f"{instance.directory}/pid") if plan["guest"] is not None else ()),
        "--bundle",
        instance.directory,
        instance.id,
    ]
