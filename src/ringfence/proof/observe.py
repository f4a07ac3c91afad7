"""Look, from outside, at the process that is about to become the job: what does the kernel say of it?

Everything is read from /proc/PID and the cgroup files while the process waits at the gate; nothing is taken from
the plan's own words. Each observer answers for a family of controls with {name: (value, source)}; a control for
which no observer has an answer was not observed. On the way of every run: imports only `os`.

The functions over text (`status`, `limits`, `interfaces`, `id_maps`, `mountinfo`) read such files of any kernel: of
this one, or of one in a sandbox, whose texts are a report and may say anything at all. They raise only ValueError
and IndexError, and take no longer than the text is long.
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
# 64 bits in decimal: no number that a kernel writes is longer.
_MOST_DIGITS = 20
_MASK_DIGITS = 16


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
        """Parse `line`. Raises IndexError for one that is too short."""
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
            text += f" size={size(values.get('size', ''))} inodes={values.get('nr_inodes', '')}"
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


def observe(subject: Subject, observers: tuple[Callable[[Subject], Seen], ...] | None = None) -> Seen:
    """Return everything that can be seen of `subject` from here; what cannot be read is simply not in it.

    `observers` are those to ask, such as `PART` and `GROUP`; all if there are none.
    """
    seen: Seen = {}
    for observer in _OBSERVERS if observers is None else observers:
        try:
            seen.update(observer(subject))
        except (OSError, ValueError, IndexError, KeyError):
            continue  # nothing was seen: the comparison will say so
    return seen


def mounts(pid: int) -> list[Mount]:
    """Return the mounts of `pid`'s namespace. Raises OSError."""
    return mountinfo(_read(f"/proc/{pid}/mountinfo"))


def mountinfo(text: str) -> list[Mount]:
    """Return the mounts of a /proc/PID/mountinfo, in its order. Raises IndexError for a line that is none."""
    return [Mount(line) for line in _lines(text)]


def status(text: str, source: str) -> Seen:
    """Return what a /proc/PID/status says, with ids as its reader sees them, or -1 where the four differ.

    A kernel that leaves a line out says nothing of that control. Raises ValueError for a line that makes no sense.
    """
    fields = {name: value.strip() for name, _, value in (line.partition(":") for line in _lines(text))}
    return {control: (read(fields[name]), source) for name, control, read in _STATUS if name in fields}


def _one_id(text: str) -> int:
    """Return the real, effective, saved and file system id; one that differs is not the id that was asked for."""
    words = text.split()
    return _number(words[0]) if len(words) == 4 and len(set(words)) == 1 else -1


def _capabilities(text: str) -> list[str]:
    if len(text) != _MASK_DIGITS:
        raise ValueError("a set of capabilities has 64 bits")
    if not (mask := int(text, 16)):
        return []
    from ringfence.linux.capabilities import names

    return sorted(names(mask))


def _status(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/status"
    seen = status(_read(source), source)
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        value = seen[f"credentials.{kind}"][0]
        if isinstance(value, int):
            seen[f"credentials.{kind}"] = (inside(subject, value, own), source)
    return seen


def inside(subject: Subject, host_id: int, own: int) -> int:
    """Return the id inside the sandbox; one outside its range becomes negative, and will not compare equal.

    A sandbox without a range has the caller's `own` id alone, as 0. A negative id is none, and stays negative.
    """
    if host_id < 0:
        return host_id
    if subject.size == 0:
        return 0 if host_id == own else -host_id - 1
    within = subject.base <= host_id < subject.base + subject.size
    return host_id - subject.base if within else -host_id - 1


def _range(subject: Subject) -> Seen:
    uids, gids = (_read(f"/proc/{subject.pid}/{name}") for name in ("uid_map", "gid_map"))
    return {"credentials.range": (id_maps(uids, gids), f"/proc/{subject.pid}/uid_map")}


def id_maps(uids: str, gids: str) -> str:
    """Return a /proc/PID/uid_map and gid_map as one text."""
    return id_map(*(" ".join("; ".join(_lines(text)).split()) for text in (uids, gids)))


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
    return interfaces(_read(source), source)


def interfaces(text: str, source: str) -> Seen:
    """Return the names in a /proc/PID/net/dev. Raises IndexError for a text without the two lines above them."""
    lines = _lines(text)
    if "|" not in lines[1]:
        raise IndexError("the head of net/dev is missing")
    return {"network.interfaces": (sorted(line.partition(":")[0].strip() for line in lines[2:]), source)}


def _limits(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/limits"
    return limits(_read(source), source)


def limits(text: str, source: str) -> Seen:
    """Return the limits of a /proc/PID/limits; one whose soft and hard value differ is a text that says so."""
    seen: Seen = {}
    for line in _lines(text)[1:]:
        name, soft, hard = line[:26].strip(), line[26:47].strip(), line[47:68].strip()
        if name in _RLIMITS:
            same = soft == hard and _is_number(hard)
            seen[f"rlimit.{_RLIMITS[name]}"] = (int(hard) if same else f"{soft} soft, {hard} hard", source)
    return seen


def _descriptors(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/fd"
    return {"descriptors": (sorted(os.listdir(source), key=int), source)}


def _label(subject: Subject) -> Seen:
    source = f"/proc/{subject.pid}/attr/current"
    return {"lsm.apparmor": (_read(source).strip("\0\n ").partition(" (")[0], source)}


def _membership(subject: Subject) -> Seen:
    group = subject.cgroup
    if group is None:
        return {}
    return {"cgroup.membership": (_is_member(subject, group), f"/proc/{subject.pid}/cgroup")}


def _cgroup(subject: Subject) -> Seen:
    group = subject.cgroup
    if group is None:
        return {}
    seen: Seen = {}
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
    for line in _lines(text):
        kind, number, access = line.split()
        if access == "m" or (kind != "a" and (number in _HARMLESS or number.startswith(_PTY_MAJORS))):
            continue  # a node may be made, which needs CAP_MKNOD, but not opened
        yield line


def _is_member(subject: Subject, group: Cgroup) -> bool:
    """Say whether the kernel counts the process in `group` in every hierarchy that has a controller of it."""
    found = {}
    for line in _lines(_read(f"/proc/{subject.pid}/cgroup")):
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


def size(text: str) -> int:
    """Return "64k", "8m" or "4096" in bytes, -1 for "". Raises ValueError for anything else."""
    units = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    if not text:
        return -1
    return _number(text[:-1]) * units[text[-1]] if text[-1] in units else _number(text)


def _is_number(text: str) -> bool:
    return len(text) <= _MOST_DIGITS and text.isascii() and text.isdigit()


def _number(text: str) -> int:
    if not _is_number(text):
        raise ValueError(f"not a number: {text[:_MOST_DIGITS]!r}")
    return int(text)


def _lines(text: str) -> list[str]:
    """Return the lines of a file of /proc: unlike for `splitlines`, nothing but a newline ends one."""
    return text.removesuffix("\n").split("\n") if text else []


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


# Line, control, and what makes a value of its text.
_STATUS: tuple[tuple[str, str, Callable[[str], Value]], ...] = (
    ("Uid", "credentials.uid", _one_id),
    ("Gid", "credentials.gid", _one_id),
    ("Groups", "credentials.groups", lambda text: text.split()),
    ("CapInh", "capabilities.inheritable", _capabilities),
    ("CapPrm", "capabilities.permitted", _capabilities),
    ("CapEff", "capabilities.effective", _capabilities),
    ("CapBnd", "capabilities.bounding", _capabilities),
    ("CapAmb", "capabilities.ambient", _capabilities),
    ("NoNewPrivs", "no_new_privileges", lambda text: text == "1"),
    ("Seccomp", "seccomp.mode", lambda text: _SECCOMP_MODES.get(text, text)),
    ("Seccomp_filters", "seccomp.filters", _number),
)
_OBSERVERS: tuple[Callable[[Subject], Seen], ...] = (
    _status,
    _range,
    _namespaces,
    _interfaces,
    _limits,
    _descriptors,
    _label,
    _membership,
    _cgroup,
    _mounts,
    _names,
)
# What is asked of a process that is a part of the sandbox and not its job, and of the cgroup that all of it is in.
PART = (_status, _range, _namespaces, _interfaces, _membership)
GROUP = (_membership, _cgroup)
