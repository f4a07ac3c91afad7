"""The root file system of a sandbox as a list of small operations, carried out in a private mount namespace.

The runtime itself mounts only what must be mounted from inside (/proc, /dev, /sys). Everything that touches a
host path is staged here, so that one piece of code opens all of them, and so that a crash leaves no mount behind:
the namespace dies with its last process.
"""

from ringfence.errors import MountError
from ringfence.host.facts import Host
from ringfence.host.sources import Source
from ringfence.plan.document import Bind, Control, Directory, Op
from ringfence.plan.workload import Workload
from ringfence.policy.model import Policy

WORK = "/work"
AGENT = "/.ringfence"
_SKELETON = "skeleton"
# The agent, a few small files, and what is copied of the host's /etc.
_STAGE_BYTES = 16 << 20
_STAGE_INODES = 4096

_HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"


def stage(policy: Policy, workload: Workload, host: Host) -> list[Op]:
    """Return the operations that build the root of `workload` under ``root`` in the staging directory.

    Raises MountError for a mount that would cover the agent.
    """
    ops: list[Op] = []
    if host.cgroup.hybrid_v2_mount and not host.rootless:
        # crun refuses a host that has v2 beside v1; it must not see the second one.
        ops.append({"op": "hide", "path": host.cgroup.hybrid_v2_mount})
    ops.append(
        {
            "op": "tmpfs",
            "at": ".",
            "size_bytes": _STAGE_BYTES,
            "inodes": _STAGE_INODES,
            "mode": 0o711,
            "owner": "root",
        }
    )
    ops += _skeleton(policy, workload)
    ops += _image(workload, rootless=host.rootless)
    ops += _overlay(policy, workload, rootless=host.rootless)
    ops += _writable(policy, workload)
    ops += _binds(workload, rootless=host.rootless)
    return ops


def _skeleton(policy: Policy, workload: Workload) -> list[Op]:
    """The topmost layer: mount points and our own files, so that no image has to have or lose any."""
    points = ["/proc", "/dev", "/tmp", *(["/sys"] if policy.filesystem.sysfs else [])]
    ops: list[Op] = [_directory(_SKELETON, "/")]
    ops += [_directory(_SKELETON, point) for point in points]
    ops.append(_directory(_SKELETON, WORK, job=policy.filesystem.root == "writable"))
    ops.append(_directory(_SKELETON, "/etc"))
    for name, text in (("hosts", _HOSTS), ("hostname", "sandbox\n"), ("resolv.conf", "")):
        ops.append({"op": "file", "at": f"{_SKELETON}/etc/{name}", "text": text, "mode": 0o644})
    ops.append({"op": "agent", "at": _SKELETON + AGENT})
    files = workload.host_files
    if files is not None:
        ops += [_directory(_SKELETON, path) for path in files.binds]
        ops += [
            {"op": "symlink", "at": _SKELETON + path, "target": target} for path, target in files.symlinks
        ]
        ops += [{"op": "host-file", "at": _SKELETON + path, "source": source} for path, source in files.files]
        ops += [
            {"op": "file", "at": _SKELETON + path, "text": text, "mode": 0o644}
            for path, text in _accounts().items()
        ]
    ops += [_directory(_SKELETON, path) for path in _volumes(policy, workload)]
    if workload.start.cwd and not _under_tmpfs(workload.start.cwd):
        # As docker does, a working directory that the image does not have is made.
        ops.append(_directory(_SKELETON, workload.start.cwd))
    # A file of ours that a mount covers is its mount point already.
    made = {op["at"] for op in ops if op["op"] in ("file", "host-file")}
    for source in workload.sources:
        if source.target == AGENT or source.target.startswith(f"{AGENT}/"):
            raise MountError(
                f"a mount cannot cover {AGENT}", hint="the agent is there; choose another target"
            )
        if not _under_tmpfs(source.target):
            needed = _mount_point(_SKELETON, source.target, source.kind)
            ops += [op for op in needed if op["op"] != "file" or op["at"] not in made]
    return ops


def _accounts() -> dict[str, str]:
    from ringfence.image.skeleton import account_files, name_files

    found = account_files() | {
        name: text for name, text in name_files().items() if name == "etc/nsswitch.conf"
    }
    return {f"/{name}": text.decode() for name, text in found.items()}


def _image(workload: Workload, *, rootless: bool) -> list[Op]:
    """One directory for each layer, the image's root among them; an overlay wants two even where there is none."""
    if not workload.layers:
        return [_directory(_names(workload)[0], "/")]
    ops: list[Op] = []
    for name, layer in zip(_names(workload), workload.layers, strict=True):
        ops.append(_directory(name, "/"))
        ops.append(
            {
                "op": "bind",
                "source": layer,
                "at": name,
                "below": "stage",
                "kind": "directory",
                "ids": "none" if rootless else "image",
                "read_only": True,
            }
        )
    return ops


def _names(workload: Workload) -> list[str]:
    # Short: the overlay's options, which name all layers, must fit into one page.
    return [f"l{place}" for place in range(len(workload.layers) or 1)]


def _overlay(policy: Policy, workload: Workload, *, rootless: bool) -> list[Op]:
    lower = [_SKELETON, *reversed(_names(workload))]
    ops: list[Op] = [_directory("root", "/")]
    if policy.filesystem.root == "writable":
        ops.append(_directory("upper", "/"))
        ops.append(
            {
                "op": "tmpfs",
                "at": "upper",
                "size_bytes": policy.limits.disk_bytes,
                "inodes": policy.limits.inodes,
                "mode": 0o700,
                "owner": "root",
            }
        )
        ops += [_directory("upper", "/files"), _directory("upper", "/work")]
        ops.append({"op": "overlay", "lower": lower, "upper": "upper", "at": "root", "user": rootless})
    else:
        ops.append({"op": "overlay", "lower": lower, "upper": "", "at": "root", "user": rootless})
    return ops


def _writable(policy: Policy, workload: Workload) -> list[Op]:
    """The tmpfs that the job may write to; a target of the policy's own takes its place.

    What the image declares as volumes shares one tmpfs with the work directory, and so its limits.
    """
    taken = {mount.target for mount in policy.filesystem.mounts}
    ops: list[Op] = []
    if "/tmp" not in taken:
        ops.append(
            {
                "op": "tmpfs",
                "at": "root/tmp",
                "size_bytes": policy.filesystem.tmp_bytes,
                "inodes": policy.limits.inodes,
                "mode": 0o1777,
                "owner": "root",
            }
        )
    shared = [path for path in (WORK, *_volumes(policy, workload)) if path not in taken]
    if policy.filesystem.root == "writable":
        return ops
    if shared and shared != [WORK]:
        ops.append(_directory("scratch", "/"))
        ops.append(
            {
                "op": "tmpfs",
                "at": "scratch",
                "size_bytes": policy.limits.disk_bytes,
                "inodes": policy.limits.inodes,
                "mode": 0o711,
                "owner": "root",
            }
        )
        for place, path in enumerate(shared):
            ops.append(_directory("scratch", f"/{place}", job=True))
            ops.append({"op": "share", "source": f"scratch/{place}", "at": path})
    elif shared:
        ops.append(
            {
                "op": "tmpfs",
                "at": "root" + WORK,
                "size_bytes": policy.limits.disk_bytes,
                "inodes": policy.limits.inodes,
                "mode": 0o755,
                "owner": "job",
            }
        )
    return ops


def _volumes(policy: Policy, workload: Workload) -> tuple[str, ...]:
    """Return the image's volumes that get a directory of their own; a writable root has no need of any."""
    if policy.filesystem.root == "writable":
        return ()
    found: list[str] = []
    for path in workload.start.volumes:
        parts = path.split("/")
        if (
            not path.startswith("/")
            or ".." in parts
            or "." in parts
            or parts[1] in ("", "proc", "sys", "dev")
        ):
            raise MountError(f"the image declares the volume {path!r}", hint="no sandbox can have one there")
        plain = "/" + "/".join(part for part in parts if part)
        if plain not in (WORK, "/tmp") and not _under_tmpfs(plain) and plain not in found:
            found.append(plain)
    # One inside another is a directory that the job can make; one around a mount of the policy gives way to it.
    kept = [path for path in found if not any(path.startswith(f"{other}/") for other in found)]
    targets = [mount.target for mount in policy.filesystem.mounts]
    return tuple(
        sorted(path for path in kept if not any(target.startswith(f"{path}/") for target in targets))
    )


def _binds(workload: Workload, *, rootless: bool) -> list[Op]:
    ops: list[Op] = []
    for path in workload.host_files.binds if workload.host_files else ():
        ops.append(_bind(path, path, ids="none" if rootless else "image"))
    for source in sorted(workload.sources, key=lambda source: source.target.count("/")):
        if source.kind == "device":
            continue  # the runtime binds device nodes, after it has made /dev
        # In a mount around it nothing of ours is made: that is a directory of the host's, and a job may have filled it.
        if _under_tmpfs(source.target) and not _inside_another(source, workload):
            ops += _mount_point("root", source.target, source.kind)
        bind = _bind(source.source, source.target, ids="none" if rootless else "owner")
        ops.append({**bind, "kind": source.kind, "read_only": source.read_only})
    return ops


def _inside_another(source: Source, workload: Workload) -> bool:
    return any(source.target.startswith(f"{other.target}/") for other in workload.sources)


def _bind(source: str, target: str, *, ids: str) -> Bind:
    return {
        "op": "bind",
        "source": source,
        "at": target,
        "below": "root",
        "kind": "directory",
        "ids": "none" if ids == "none" else "owner" if ids == "owner" else "image",
        "read_only": True,
    }


def _mount_point(below: str, target: str, kind: str) -> list[Op]:
    if kind == "directory":
        return [_directory(below, target)]
    if kind == "device":
        return []
    parent = target.rpartition("/")[0]
    return [
        _directory(below, parent or "/"),
        {"op": "file", "at": below + target, "text": "", "mode": 0o644},
    ]


def _directory(below: str, path: str, *, job: bool = False) -> Directory:
    return {
        "op": "directory",
        "at": (below + path).rstrip("/"),
        "mode": 0o755,
        "owner": "job" if job else "root",
    }


def _under_tmpfs(target: str) -> bool:
    return target.startswith(("/tmp/", WORK + "/"))


def stage_controls(ops: list[Op]) -> list[Control]:
    """Return what the sandbox's mountinfo must show of `ops`."""
    found: list[Control] = []
    for op in ops:
        if op["op"] == "overlay":
            way = "rw" if op["upper"] else "ro"
            found.append(_mount("/", "filesystem.root", f"overlay {way},nosuid,nodev"))
        elif op["op"] == "tmpfs" and op["at"].startswith("root/"):
            target = op["at"].removeprefix("root")
            field = "filesystem.tmp" if target == "/tmp" else "limits.disk"
            size = f"size={op['size_bytes']} inodes={op['inodes']}"
            found.append(_mount(target, field, f"tmpfs rw,nosuid,nodev {size}"))
        elif op["op"] == "share":
            size = next(
                f"size={tmpfs['size_bytes']} inodes={tmpfs['inodes']}"
                for tmpfs in ops
                if tmpfs["op"] == "tmpfs" and tmpfs["at"] == "scratch"
            )
            found.append(_mount(op["at"], "limits.disk", f"tmpfs rw,nosuid,nodev {size}"))
        elif op["op"] == "bind" and op["below"] == "root":
            way = "ro" if op["read_only"] else "rw"
            found.append(_mount(op["at"], "filesystem.mounts", f"bind {way},nosuid,nodev of {op['source']}"))
    return found


def _mount(target: str, field: str, asked: str) -> Control:
    return {"name": f"mount:{target}", "field": field, "asked": asked}
