"""Look at a sandbox with a kernel of its own: at its parts from the host, and at its job through what it reports.

To the host the job is no process, so nothing of /proc/PID shows it. What the host can see is what holds the sandbox:
the kernel inside (the sentry), the server of its files (the gofer), the door, their cgroup and their mounts. These
are observed. What the kernel inside says of the job is reported: it is compared as strictly, and believed less.
A report is bounded in size by its frame; it may be cut off, garbage, or a lie, and makes controls fail then.
"""

from __future__ import annotations

import os

from ringfence.proof.observe import (
    GROUP,
    PART,
    Subject,
    id_maps,
    interfaces,
    limits,
    mountinfo,
    mounts,
    observe,
    size,
    status,
)
from ringfence.proof.prove import NOBODY, asked_range, binds, counted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.plan.document import Control, Plan, Value
    from ringfence.proof.observe import Mount, Seen
    from ringfence.runtime.base import Instance

# A reported value goes into the proof and into messages: what is longer cannot be what was asked, and is cut.
_MOST_CHARACTERS = 256
_MOST_ITEMS = 64
# What the kernel inside mounts though nobody asks it to.
_OF_ITSELF = ("/", "/dev/pts")


class Guest:
    """What stands for a sandbox with a kernel of its own: its report, and its parts as processes of the host.

    `report` has the texts of the agent's REPORTED frame by name, such as "status" and "net/dev"; `parts` the host's
    process ids by what the processes are: sentry, gofer and door, or vmm and bridge.
    """

    __slots__ = ("parts", "report")

    def __init__(self, *, report: dict[str, str], parts: dict[str, int]) -> None:
        """Name them."""
        self.report = report
        self.parts = parts


def look(plan: Plan, subject: Subject, guest: Guest | None, descriptors: int) -> tuple[Seen, Seen]:
    """Return (what the host sees, what the kernel inside reports); without a `guest` there is little of either.

    `descriptors` is the agent's count of those of the held process.
    """
    seen = observe(subject, GROUP)
    if guest is None:
        return seen, {}
    for name, pid in guest.parts.items():
        seen |= _part(plan, subject, name, pid)
    if plan["isolation"] == "gvisor":
        seen |= _served(plan, guest.parts.get("gofer", 0))
        seen |= _own_mounts(guest.parts.get("sentry", 0))
        told = reported(guest.report) | _others(plan, guest.report)
    else:
        seen |= _accelerator(guest.parts.get("vmm", 0))
        told = reported(guest.report, who="guest") | _linux_mounts(plan, guest.report)
    told["descriptors"] = (counted(descriptors), "agent")
    return seen, told


def asked_of(control: Control, plan: Plan, instance: Instance) -> Value:
    """Fill in what is known only of this sandbox, or stands elsewhere in its plan."""
    name, asked = control["name"], control["asked"]
    if name == "cgroup.memory_bytes" and isinstance(asked, int):
        return asked + instance.memory_base_bytes  # what the kernel inside needs is not the job's to use
    part, _, rest = name.partition(".")
    if rest == "program":
        return _program(plan)
    if rest == "credentials.range":
        if part != "sentry":
            return asked_range(plan, instance)
        # Its own user namespace has nothing but the one id that it runs as; a short range ends with what stands for it.
        on_host = instance.base + min(NOBODY, plan["user"]["range_size"] - 1)
        return f"{NOBODY} {on_host} 1"
    return asked


def _program(plan: Plan) -> str:
    kernel = plan.get("guest") or plan.get("machine")
    return kernel["program"] if kernel else ""


def _part(plan: Plan, subject: Subject, name: str, pid: int) -> Seen:
    """Look at the process `pid`, as at any process of the host; the controls are called "NAME.CONTROL"."""
    part = Subject(pid=pid, base=subject.base, size=subject.size, cgroup=subject.cgroup, rules=subject.rules)
    seen = observe(part, PART)
    if plan["rootless"]:
        seen |= _own_as_root(seen)
    link = f"/proc/{pid}/exe"
    try:
        seen["program"] = (_executed(link, _program(plan)), link)
    except (OSError, ValueError):
        pass  # it has ended, or is not ours to look at: not observed
    return {f"{name}.{control}": found for control, found in seen.items()}


def _own_as_root(seen: Seen) -> Seen:
    """Return 0 for the ids of `seen` that are the caller's own: without root, these stand for root inside."""
    own = {"credentials.uid": -os.geteuid() - 1, "credentials.gid": -os.getegid() - 1}  # as outside the range
    return {
        name: (0, seen[name][1]) for name, value in own.items() if name in seen and seen[name][0] == value
    }


def _executed(link: str, program: str) -> str:
    """Return `program` if that very file is being executed, and otherwise what `link` is called where it runs."""
    running = os.stat(link)
    try:
        wanted = os.stat(program)
        if (running.st_dev, running.st_ino) == (wanted.st_dev, wanted.st_ino):
            return program
    except FileNotFoundError:
        pass
    name = os.readlink(link)
    # In a ring another file may be called just so.
    return name if name != program else f"another file called {name}"


def _served(plan: Plan, gofer: int) -> Seen:
    """Say what the gofer has to serve: its root is the job's, and each of its mounts one that the job is given."""
    try:
        found = {mount.target: mount for mount in mounts(gofer)}
        source = f"/proc/{gofer}/mountinfo"
        seen: Seen = {f"mount:{target}": (mount.words(), source) for target, mount in found.items()}
        seen |= binds(plan, found, source)
    except (OSError, ValueError, IndexError):
        return {}
    names = (control["name"] for control in plan["controls"])
    asked = {name.removeprefix("mount:") for name in names if name.startswith("mount:")}
    seen["mounts.others"] = (sorted(found.keys() - asked), source)
    return seen


def _own_mounts(sentry: int) -> Seen:
    """Say what the kernel inside has of files on the host: mounts, each as "TARGET TYPE WAYS"."""
    source = f"/proc/{sentry}/mountinfo"
    try:
        found = mounts(sentry)
    except (OSError, ValueError, IndexError):
        return {}
    return {"sentry.mounts": ([f"{mount.target} {_mount_words(mount)}" for mount in found], source)}


def _others(plan: Plan, report: dict[str, str]) -> Seen:
    """Say which mounts the kernel inside has made beyond the plan's and those of its own; never raises."""
    guest, text = plan.get("guest"), report.get("mountinfo", "")
    if guest is None or not text.endswith("\n"):
        return {}
    expected = [*_OF_ITSELF, *(mount["destination"] for mount in guest["oci"]["mounts"])]
    others = []
    try:
        for mount in mountinfo(text):
            if mount.target in expected:
                expected.remove(mount.target)  # each once: a second one would hide the first
            else:
                others.append(mount.target)
    except (ValueError, IndexError):
        return {}
    return {"guest.mounts.others": (_bounded(sorted(others)), f"sentry: {_PLACES['mountinfo']}")}


def _accelerator(vmm: int) -> Seen:
    """Say by what the machine runs: a VMM that uses KVM has descriptors of it, and one that has none emulates."""
    source = f"/proc/{vmm}/fd"
    try:
        links = [os.readlink(f"{source}/{name}") for name in os.listdir(source)]
    except OSError:
        return {}
    machines = [link for link in links if link in ("anon_inode:kvm-vm", "anon_inode:[kvm-vm]")]
    return {"vmm.accelerator": ("kvm" if machines else "tcg", source)}


def _linux_mounts(plan: Plan, report: dict[str, str]) -> Seen:
    """Return the guest's mounts in the words of the linux tier, and those that no control asks for; never raises."""
    text, source = report.get("mountinfo", ""), f"guest: {_PLACES['mountinfo']}"
    if not text.endswith("\n"):
        return {}
    try:
        found = {mount.target: mount for mount in mountinfo(text)}
        told: Seen = {f"mount:{target}": (mount.words(), source) for target, mount in found.items()}
    except (ValueError, IndexError):
        return {}
    names = (control["name"] for control in plan["controls"])
    asked = {name.removeprefix("mount:") for name in names if name.startswith("mount:")}
    machine = plan["machine"]
    lines = machine["setup"] if machine else []
    hidden = {line.partition("=")[2] for line in lines if line.startswith(("mask=", "readonly="))}
    told["mounts.others"] = (sorted(found.keys() - asked - hidden), source)
    return {name: (_bounded(value), where) for name, (value, where) in told.items()}


def reported(report: dict[str, str], who: str = "sentry") -> Seen:
    """Return what the texts of a report of `who` say, by the names of controls; a text without sense says nothing.

    Never raises: whatever a text holds, the worst it can do is to make controls fail.
    """
    told: Seen = {}
    texts = {name: text for name, text in report.items() if name not in _OF_LINES or text.endswith("\n")}
    for name, read in _READERS.items():
        if name in texts:
            try:
                told.update(read(texts[name], f"{who}: {_PLACES[name]}"))
            except (ValueError, IndexError):
                continue
    if "uid_map" in texts and "gid_map" in texts:
        maps = id_maps(texts["uid_map"], texts["gid_map"])
        told["guest.credentials.range"] = (maps, f"{who}: {_PLACES['uid_map']}")
    return {name: (_bounded(value), source) for name, (value, source) in told.items()}


def _kernel(text: str, source: str) -> Seen:
    """Tell a kernel that is not this one by its /proc/version. Raises ValueError for an empty one."""
    if not text.strip():
        raise ValueError("a kernel without a version")
    with open("/proc/version", encoding="utf-8", errors="surrogateescape") as file:
        return {"kernel": ("the host's" if text.strip() == file.read().strip() else "own", source)}


def _new_privileges(text: str, source: str) -> Seen:
    if text not in ("0", "1"):
        raise ValueError("neither set nor unset")
    return {"no_new_privileges": (text == "1", source)}


def _guest_mounts(text: str, source: str) -> Seen:
    return {f"guest.mount:{mount.target}": (_mount_words(mount), source) for mount in mountinfo(text)}


def _mount_words(mount: Mount) -> str:
    """Return "tmpfs ro size=4096": the kernel inside shows of a mount little more than its type and size."""
    ways = ",".join(flag for flag in ("ro", "rw") if flag in mount.flags)
    values = dict(option.partition("=")[::2] for option in mount.options)
    return f"{mount.kind} {ways}" + (f" size={size(values['size'])}" if "size" in values else "")


def _bounded(value: Value) -> Value:
    if isinstance(value, str):
        return value if len(value) <= _MOST_CHARACTERS else value[:_MOST_CHARACTERS] + "…"
    if isinstance(value, list):
        words = [word if len(word) <= _MOST_CHARACTERS else word[:_MOST_CHARACTERS] + "…" for word in value]
        return (
            words
            if len(words) <= _MOST_ITEMS
            else [*words[:_MOST_ITEMS], f"and {len(words) - _MOST_ITEMS} more"]
        )
    return value


# Where the kernel inside has it; PID is the held job's number there.
_PLACES = {
    "status": "/proc/PID/status",
    "limits": "/proc/PID/limits",
    "mountinfo": "/proc/PID/mountinfo",
    "net/dev": "/proc/PID/net/dev",
    "uid_map": "/proc/PID/uid_map",
    "version": "/proc/version",
    "hostname": "uname(2)",
    "no_new_privileges": "prctl(2), PR_GET_NO_NEW_PRIVS",
}
# Files whose every line ends: a text without its last newline was cut off, and its last line may say something else.
_OF_LINES = frozenset({"status", "limits", "mountinfo", "net/dev", "uid_map", "gid_map", "version"})
# The explicit ones come last and so count before a line of status.
_READERS: dict[str, Callable[[str, str], Seen]] = {
    "status": status,
    "limits": limits,
    "mountinfo": _guest_mounts,
    "net/dev": interfaces,
    "version": _kernel,
    "hostname": lambda text, source: {"hostname": (text, source)},
    "no_new_privileges": _new_privileges,
}
