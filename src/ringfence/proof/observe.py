"""Look, from outside, at the process that is about to become the job: what does the kernel say of it?

Everything is read from /proc/PID and the cgroup files while the process waits at the gate; nothing is taken from
the plan's own words. Each observer answers for a family of controls with {name: (value, source)}; a control for
which no observer has an answer was not observed. On the way of every run: imports only `os`.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ringfence.cgroup.group import Cgroup
    from ringfence.plan.document import Value

    Seen = dict[str, tuple[Value, str]]

_MOST_BYTES = 4 << 20
# /proc/PID/ns names -> the OCI names that plans use.
_NAMESPACES = {
    "user": "user",
    "pid": "pid",
    "mnt": "mount",
    "net": "network",
    "ipc": "ipc",
    "uts": "uts",
    "cgroup": "cgroup",
}
_CAPABILITY_SETS = {
    "CapInh": "inheritable",
    "CapPrm": "permitted",
    "CapEff": "effective",
    "CapBnd": "bounding",
    "CapAmb": "ambient",
}
_SECCOMP_MODES = {"0": "off", "1": "strict", "2": "filter"}
_RLIMITS = {
    "Max core file size": "core",
    "Max file size": "fsize",
    "Max open files": "nofile",
    "Max processes": "nproc",
    "Max stack size": "stack",
}
# Character devices that a job may have: null, zero, full, random, urandom, tty, console, ptmx and ptys.
_HARMLESS = {"1:3", "1:5", "1:7", "1:8", "1:9", "5:0", "5:1", "5:2"}
_PTY_MAJORS = tuple(f"{major}:" for major in range(136, 144))


class Subject:
    """The process looked at, and what it is compared with.

    `base` and `size` are the range of host ids it should have; `size` 0 means the caller's own id alone.
    `rules` are the devices that the policy itself allows in the devices cgroup, as "c 10:229 rw".
    """

    __slots__ = ("base", "cgroup", "pid", "rules", "size")

    def __init__(
        self, *, pid: int, base: int, size: int, cgroup: Cgroup | None, rules: tuple[str, ...]
    ) -> None:
        """Name the process."""
        self.pid = pid
        self.base = base
        self.size = size
        self.cgroup = cgroup
        self.rules = rules


class Mount:
    """One line of mountinfo; see proc_pid_mountinfo(5)."""

    __slots__ = ("device", "flags", "kind", "options", "root", "target")

    def __init__(self, line: str) -> None:
        """Parse `line`."""
        before, _, after = line.partition(" - ")
        words, rest = before.split(" "), after.split(" ")
        self.device = words[2]
        self.root = _unescape(words[3])
        self.target = _unescape(words[4])
        self.flags = words[5].split(",")
        self.kind = rest[0]
        self.options = rest[-1].split(",")

    def words(self) -> str:
        """Return "tmpfs rw,nosuid,nodev size=65536 inodes=64": what a plan asks of a mount, as it was found."""
        text = f"{self.kind} {self.ways()}"
        if self.kind == "tmpfs":
            values = dict(option.partition("=")[::2] for option in self.options)
            text += f" size={_size(values.get('size', ''))} inodes={values.get('nr_inodes', '')}"
        return text

    def ways(self) -> str:
        """Return "rw,nosuid,nodev": the flags that a plan asks about."""
        return ",".join(flag for flag in ("ro", "rw", "nosuid", "nodev", "noexec") if flag in self.flags)


def sources(mount: Mount, host: Iterable[Mount]) -> list[str]:
    """Return every path under which the mounts `host` show what `mount` shows: the same place of one file system."""
    found = []
    for other in host:
        if other.device != mount.device:
            continue
        root = other.root.rstrip("/")
        if mount.root == root or mount.root.startswith(f"{root}/"):
            found.append(other.target.rstrip("/") + mount.root[len(root) :].rstrip("/") or "/")
    return found


def observe(subject: Subject) -> Seen:
    """Return everything that can be seen of `subject` from here; what cannot be read is simply not in it."""
    seen: Seen = {}
    for observer in _OBSERVERS:
        try:
            seen.update(observer(subject))
        except (OSError, ValueError, IndexError, KeyError):
            continue  # nothing was seen: the comparison will say so
    return seen


def mounts(pid: int) -> list[Mount]:
    """Return the mounts of `pid`'s namespace. Raises OSError."""
    return [Mount(line) for line in _read(f"/proc/{pid}/mountinfo").splitlines()]


def _status(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/status"
    fields = dict(line.partition(":")[::2] for line in _read(source).splitlines())
    fields = {name: value.strip() for name, value in fields.items()}
    seen: Seen = {
        "credentials.groups": (fields["Groups"].split(), source),
        "no_new_privileges": (fields["NoNewPrivs"] == "1", source),
        "seccomp.mode": (_SECCOMP_MODES.get(fields["Seccomp"], fields["Seccomp"]), source),
        "seccomp.filters": (int(fields["Seccomp_filters"]), source),
    }
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        # Real, effective, saved and file system id; one that differs is not the id that was asked for.
        ids = {int(word) for word in fields[kind.capitalize()].split()}
        value = ids.pop() if len(ids) == 1 else -1
        seen[f"credentials.{kind}"] = (_inside(subject, value, own), source)
    for name, kind in _CAPABILITY_SETS.items():
        seen[f"capabilities.{kind}"] = (_capabilities(int(fields[name], 16)), source)
    return seen


def _inside(subject: Subject, host_id: int, own: int) -> int:
    """Return the id inside the sandbox; one outside its range becomes negative, and will not compare equal.

    A sandbox without a range has the caller's `own` id alone, as 0.
    """
    if subject.size == 0:
        return 0 if host_id == own else -host_id - 1
    inside = subject.base <= host_id < subject.base + subject.size
    return host_id - subject.base if inside else -host_id - 1


def _capabilities(mask: int) -> list[str]:
    from ringfence.linux.capabilities import names

    return sorted(names(mask)) if mask else []


def _range(subject: Subject) -> Seen:
    maps = [_read(f"/proc/{subject.pid}/{name}").splitlines() for name in ("uid_map", "gid_map")]
    texts = [" ".join("; ".join(lines).split()) for lines in maps]
    return {"credentials.range": (id_map(*texts), f"/proc/{subject.pid}/uid_map")}


def id_map(uids: str, gids: str) -> str:
    """Return the two maps of a user namespace as one text, which is usually the same for both."""
    return uids if uids == gids else f"{uids} (groups: {gids})"


def _namespaces(subject: Subject) -> Seen:
    seen: Seen = {}
    for link, name in _NAMESPACES.items():
        source = f"/proc/{subject.pid}/ns/{link}"
        theirs = os.readlink(source)
        shared = [whose for whose in ("self", "1") if _link(f"/proc/{whose}/ns/{link}") == theirs]
        seen[f"namespace.{name}"] = (f"shared with process {shared[0]}" if shared else "own", source)
    return seen


def _interfaces(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/net/dev"
    lines = _read(source).splitlines()[2:]
    return {"network.interfaces": (sorted(line.partition(":")[0].strip() for line in lines), source)}


def _limits(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/limits"
    seen: Seen = {}
    for line in _read(source).splitlines()[1:]:
        name, soft, hard = line[:26].strip(), line[26:47].strip(), line[47:68].strip()
        if name in _RLIMITS:
            value = int(hard) if hard.isdigit() and soft == hard else f"{soft} soft, {hard} hard"
            seen[f"rlimit.{_RLIMITS[name]}"] = (value, source)
    return seen


def _descriptors(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/fd"
    return {"descriptors": (sorted(os.listdir(source), key=int), source)}


def _label(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/attr/current"
    return {"lsm.apparmor": (_read(source).strip("\0\n ").partition(" (")[0], source)}


def _cgroup(subject: Subject) -> Seen:
    group = subject.cgroup
    if group is None:
        return {}
    seen: Seen = {"cgroup.membership": (_is_member(subject, group), f"/proc/{subject.pid}/cgroup")}
    for name, (value, source) in group.observed().items():
        if name == "io" and isinstance(value, dict):
            for disk, limits in value.items():
                seen.update({f"cgroup.io.{key}:{disk}": (limit, source) for key, limit in limits.items()})
        elif not isinstance(value, dict):
            seen[f"cgroup.{name}"] = (value, source)
    devices = group.layout.mount_of("devices")
    if devices and group.layout.version != "v2":
        source = f"{devices}{group.path}/devices.list"
        allowed = _allowed_devices(_read(source))
        seen["cgroup.devices"] = (sorted(rule for rule in allowed if rule not in subject.rules), source)
    return seen


def _allowed_devices(text: str) -> Iterable[str]:
    """Yield the lines of a v1 devices.list that allow more than the harmless devices, or making nodes."""
    for line in text.splitlines():
        kind, number, access = line.split()
        if access == "m" or (kind != "a" and (number in _HARMLESS or number.startswith(_PTY_MAJORS))):
            continue  # a node may be made, which needs CAP_MKNOD, but not opened
        yield line


def _is_member(subject: Subject, group: Cgroup) -> bool:
    """Say whether the kernel counts the process in `group` in every hierarchy that has a controller of it."""
    found = {}
    for line in _read(f"/proc/{subject.pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        found.update(dict.fromkeys(controllers.split(","), path))
    layout = group.layout
    needed = (
        [""] if layout.version == "v2" else [name for name in layout.controllers if name in layout.mounts]
    )
    return bool(needed) and all(found.get(name) == group.path for name in needed)


def _mounts(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/mountinfo"
    seen: Seen = {f"mount:{mount.target}": (mount.words(), source) for mount in mounts(subject.pid)}
    return seen


def _names(subject: Subject) -> Seen:
    """Look from inside the job's own uts, ipc and network namespaces, on a thread that enters them."""
    from ringfence.linux import libc
    from ringfence.linux.thread import in_thread

    kinds = libc.CLONE_NEWUTS | libc.CLONE_NEWIPC | libc.CLONE_NEWNET
    pidfd = os.pidfd_open(subject.pid)

    def look() -> Seen:
        libc.setns(pidfd, kinds)
        return {"hostname": (os.uname().nodename, f"uts namespace of {subject.pid}")}

    try:
        return in_thread(look)
    finally:
        os.close(pidfd)


def sysctls(pid: int, names: Iterable[str]) -> Seen:
    """Return {"sysctl:NAME": value} as seen from inside the namespaces of `pid`; {} if they cannot be entered."""
    from ringfence.linux import libc
    from ringfence.linux.thread import in_thread

    wanted = list(names)
    if not wanted:
        return {}
    pidfd = os.pidfd_open(pid)

    def look() -> Seen:
        libc.setns(pidfd, libc.CLONE_NEWUTS | libc.CLONE_NEWIPC | libc.CLONE_NEWNET)
        files = {name: "/proc/sys/" + name.replace(".", "/") for name in wanted}
        return {f"sysctl:{name}": (" ".join(_read(path).split()), path) for name, path in files.items()}

    try:
        return in_thread(look)
    except OSError:
        return {}
    finally:
        os.close(pidfd)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # of another user's process: then it is not ours to compare with
        return ""


def _size(text: str) -> int:
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or -1)


def _unescape(text: str) -> str:
    """Undo the octal escapes of blanks, tabs, newlines and backslashes."""
    if "\\" not in text:
        return text
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) < _MOST_BYTES and (piece := os.read(fd, 65536)):
            data += piece
    finally:
        os.close(fd)
    return data.decode("utf-8", "surrogateescape")


_OBSERVERS: tuple[Callable[[Subject], Seen], ...] = (
    _status,
    _range,
    _namespaces,
    _interfaces,
    _limits,
    _descriptors,
    _label,
    _cgroup,
    _mounts,
    _names,
)
