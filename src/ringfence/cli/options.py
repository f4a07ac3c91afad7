"""The options of `run` and `plan`, spelled as docker spells them where docker has them, and what they mean.

Each becomes a policy field; whatever has no option of its own is reached with ``--set FIELD=VALUE``.
"""

import os

from ringfence.cli.flags import Flag, add_flags
from ringfence.errors import UsageError
from ringfence.sandbox.prepare import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ringfence.cli.image_pull import Teller
    from ringfence.plan.document import Plan

_TIERS = ("auto", "linux", "gvisor", "microvm")
_ULIMITS = {
    "nofile": "limits.open_files",
    "nproc": "limits.threads",
    "stack": "limits.stack",
    "fsize": "limits.file_size",
}


WHAT = (
    Flag("-i", "--isolation", choices=_TIERS, help="tier (docker's -i is --interactive here)"),
    Flag("--policy", default="untrusted", metavar="FILE|PRESET", help="default: untrusted"),
    Flag("--image", metavar="REF", help="an image here or in a registry; base (default), or host"),
    Flag("--rootfs", metavar="DIR", help="use this directory as the image"),
    Flag("--pull", choices=("missing", "always", "never"), default="missing", help="when to fetch the image"),
    Flag("--platform", metavar="OS/ARCH", default="", help="of an image for several; default: this host's"),
    Flag("--runtime", choices=("crun", "runc"), help="default: the first that works here"),
    Flag(
        "--gvisor-platform",
        choices=("kvm", "systrap", "ptrace"),
        default="",
        help="how gVisor gets at system calls; default: the best here",
    ),
    Flag(
        "--allow-emulation",
        kind="switch",
        help="let a microVM run without KVM: no hardware boundary then, and the proof says so",
    ),
    Flag(
        "--vmm",
        choices=("qemu", "firecracker"),
        default="",
        help="what makes the machine of a microVM; default: qemu. Firecracker needs KVM that works",
    ),
    Flag(
        "--allow-unenforced",
        kind="list",
        metavar="FIELD,...",
        help="run although these fields of the policy cannot be enforced here; the proof says so",
    ),
)
FIELDS = (
    Flag("-m", "--memory", metavar="SIZE", help="limits.memory, e.g. 512m"),
    Flag("--cpus", metavar="N", help="limits.cpus, e.g. 1.5"),
    Flag("--cpuset-cpus", metavar="LIST", help="limits.cpuset, e.g. 0-1"),
    Flag("--pids-limit", metavar="N", help="limits.pids (and limits.threads)"),
    Flag("--shm-size", metavar="SIZE", help="limits.shm"),
    Flag("--timeout", metavar="TIME", help="limits.time, e.g. 30s"),
    Flag("--read-only", metavar="true|false", help="filesystem.root; alone it means true"),
    Flag("--tmpfs", metavar="/tmp:size=SIZE", help="filesystem.tmp"),
    Flag("-v", "--volume", kind="list", metavar="SRC:DST[:rw]", help="mount, read-only unless :rw"),
    Flag("-u", "--user", metavar="UID[:GID]", help="user inside the sandbox"),
    Flag("--cap-add", kind="list", metavar="CAP", help="give a capability"),
    Flag("--network", metavar="MODE", help="network.mode: none"),
    Flag("-p", "--publish", kind="list", metavar="PORTS", help="network.publish"),
    Flag("--ulimit", kind="list", metavar="NAME=N", help="nofile, nproc, stack, fsize"),
    Flag("--sysctl", kind="list", metavar="NAME=VALUE", help="kernel parameter of its own"),
    Flag("--device", kind="list", metavar="DEV[:rwm]", help="device node"),
    Flag("--security-opt", kind="list", metavar="OPT", help="seccomp=..., no-new-privileges"),
    Flag("--set", kind="list", metavar="FIELD=VALUE", help="any field, e.g. limits.disk=1GiB"),
)
JOB = (
    Flag("--entrypoint", metavar="PROGRAM", help="in place of the image's own; '' for none"),
    Flag("-e", "--env", kind="list", metavar="NAME[=VALUE]", help="environment; nothing else gets in"),
    Flag("-w", "--workdir", metavar="DIR", help="working directory inside, default /work"),
)


def split(argv: "Sequence[str]") -> tuple[list[str], list[str] | None]:
    """Return (our words, the command after ``--``), with two of docker's ways of writing spelled out."""
    ours = list(argv)
    command = None
    if "--" in ours:
        place = ours.index("--")
        ours, command = ours[:place], ours[place + 1 :]
    spread = {
        "-it": ["--interactive", "--tty"],
        "-ti": ["--interactive", "--tty"],
        "--read-only": ["--read-only=true"],
    }
    return [part for word in ours for part in spread.get(word, [word])], command


def add_policy_options(parser: "argparse.ArgumentParser") -> None:
    """Add everything that says under what a command runs."""
    add_flags(parser.add_argument_group("what to run under"), WHAT)
    add_flags(parser.add_argument_group("single fields of the policy"), FIELDS)


def request(args: "argparse.Namespace") -> Request:
    """Return the request that parsed options make. Raises UsageError."""
    fields: dict[str, object] = {}
    simple = {
        "isolation": args.isolation,
        "limits.memory": args.memory,
        "limits.cpus": args.cpus,
        "limits.cpuset": args.cpuset_cpus,
        "limits.shm": args.shm_size,
        "limits.time": args.timeout,
        "user": args.user,
        "network.mode": args.network,
    }
    fields.update((key, value) for key, value in simple.items() if value is not None)
    if args.pids_limit is not None:
        fields["limits.pids"] = fields["limits.threads"] = _number("--pids-limit", args.pids_limit)
    if args.read_only is not None:
        fields["filesystem.root"] = "read-only" if _truth("--read-only", args.read_only) else "writable"
    if args.tmpfs is not None:
        fields["filesystem.tmp"] = _tmpfs(args.tmpfs)
    for item in args.ulimit:
        fields.update([_ulimit(item)])
    for item in args.security_opt:
        fields.update([_security(item)])
    for item in args.set:
        name, value = _pair("--set", item, "FIELD=VALUE")
        fields[name] = _yaml(name, value)
    additions: dict[str, list[object]] = {
        "capabilities": list(args.cap_add),
        "filesystem.mounts": [_volume(item) for item in args.volume],
        "network.publish": list(args.publish),
        "devices": list(args.device),
    }
    sysctls = dict(_pair("--sysctl", item, "NAME=VALUE") for item in args.sysctl)
    if args.publish and args.network is None:
        fields["network.mode"] = "ports"
    return Request(
        policy=args.policy,
        overrides=fields,
        additions={key: value for key, value in additions.items() if value},
        sysctls=sysctls,
        image=args.image,
        rootfs=args.rootfs,
        runtime=args.runtime or "",
        pull=args.pull,
        platform=args.platform,
        gvisor_platform=args.gvisor_platform,
        allow_emulation=args.allow_emulation,
        vmm=args.vmm,
        teller=_teller,
        allow_unenforced=tuple(field for item in args.allow_unenforced for field in item.split(",")),
    )


def environment(items: "Sequence[str]") -> list[str]:
    """Return "NAME=value" items; a bare NAME takes the caller's value, the only way for one to get in."""
    found = []
    for item in items:
        name, given, _ = item.partition("=")
        if not name:
            raise UsageError(f"--env {item!r} has no name", hint="write NAME=VALUE, or NAME")
        if given:
            found.append(item)
        elif name in os.environ:
            found.append(f"{name}={os.environ[name]}")
        else:
            raise UsageError(f"--env {name}: not set here", hint=f"write {name}=VALUE")
    return found


def check_workdir(path: "str | None") -> None:
    """Raise UsageError unless `path`, of --workdir, is absolute: it is a directory inside the sandbox."""
    if path is not None and not path.startswith("/"):
        raise UsageError(
            f"--workdir {path!r} is not an absolute path", hint="it names a directory inside, such as /tmp"
        )


def _volume(item: str) -> dict[str, object]:
    head, _, mode = item.rpartition(":")
    if mode not in ("ro", "rw"):
        head, mode = item, "ro"
    source, found, target = head.rpartition(":")
    if not found or not source or not target.startswith("/"):
        raise UsageError(
            f"--volume {item!r} is not SOURCE:/TARGET[:rw]",
            hint="a path with a colon can be written in a policy file, under filesystem.mounts",
        )
    return {"source": os.path.abspath(source), "target": target, "mode": mode}


def _tmpfs(item: str) -> str:
    target, _, options = item.partition(":")
    size = dict(option.partition("=")[::2] for option in options.split(",")).get("size")
    if target != "/tmp" or not size:
        raise UsageError(
            f"--tmpfs {item!r}: a sandbox has two writable directories, /tmp and /work",
            hint="size them with --tmpfs /tmp:size=64m and --set limits.disk=128MiB",
        )
    return size


def _ulimit(item: str) -> tuple[str, object]:
    name, value = _pair("--ulimit", item, "NAME=N")
    soft, _, hard = value.partition(":")
    if hard and hard != soft:
        raise UsageError(
            f"--ulimit {item!r}: soft and hard limit are always the same here", hint=f"{name}={hard}"
        )
    if name not in _ULIMITS:
        raise UsageError(f"--ulimit {name!r} is not known", hint=f"one of: {', '.join(_ULIMITS)}")
    return _ULIMITS[name], _number(f"--ulimit {name}", soft)


def _security(item: str) -> tuple[str, object]:
    name, _, value = item.replace(":", "=", 1).partition("=")
    if name == "no-new-privileges":
        return "no_new_privileges", _truth("--security-opt no-new-privileges", value or "true")
    if name == "seccomp":
        if value == "unconfined":
            raise UsageError(
                "no sandbox runs without seccomp", hint="seccomp=FILE takes a profile of your own"
            )
        return "seccomp", os.path.abspath(value) if "/" in value or value.endswith(".json") else value
    if name == "apparmor" and value in ("unconfined", "ringfence-default"):
        return "lsm", "none" if value == "unconfined" else "required"
    raise UsageError(
        f"--security-opt {item!r} is not known", hint="seccomp=..., no-new-privileges, apparmor=..."
    )


def _yaml(name: str, text: str) -> object:
    """Read what stands after ``--set FIELD=`` as a policy file would."""
    from ringfence.policy.document import scalar

    value = scalar(text)
    if text.startswith(("[", "{")):
        import json

        try:
            found: object = json.loads(text)
            return found
        except ValueError as error:
            raise UsageError(
                f"--set {name}: {error}", hint="lists and mappings are written as JSON"
            ) from error
    return value


def _pair(option: str, item: str, form: str) -> tuple[str, str]:
    name, found, value = item.partition("=")
    if not found or not name:
        raise UsageError(f"{option} {item!r} is not {form}")
    return name, value


def _number(option: str, text: str) -> int:
    if not text.isdigit():
        raise UsageError(f"{option} {text!r} is not a whole number")
    return int(text)


def _truth(option: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise UsageError(f"{option}={text!r} is neither true nor false")
    return text == "true"


def _teller() -> "Teller":
    from ringfence.cli.image_pull import Teller

    return Teller(quiet=False)


def whole_command(plan: "Plan", entrypoint: str | None, given: list[str]) -> list[str]:
    """Return what to execute: the image's entrypoint with the words given, or with its own command for none."""
    if entrypoint is not None:
        found = [*([entrypoint] if entrypoint else []), *given]
    else:
        found = [*plan["entrypoint"], *(given or plan["command"])]
    if not found:
        raise UsageError(
            "no command was given, and the image names none", hint="ringfence run -- COMMAND ARG ..."
        )
    return found
