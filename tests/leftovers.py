"""What sandboxes would leave on a host, and whose it is: others may run sandboxes here at the same time."""

import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_RANGES = Path("/run/ringfence/ranges")
_AGENTS = (".ringfence", "ringfence-agent")
# The host's own nodes, which every sandbox sees: nobody may own them or change their modes.
_NODES = ("null", "zero", "full", "random", "urandom", "tty")


def found(home: Path | None) -> dict[str, str]:
    """Return {what: sandbox id or ""} of everything there is now; `home` is this session's run directory."""
    seen = {f"directory {path}": path.name for path in _inside(home, "sandboxes")}
    seen |= {f"id range {path.name}": name for path, name in _ranges(home)}
    seen |= {f"cgroup {path}": path.name for path in _cgroups()}
    seen |= dict(_processes())
    seen |= {f"mount {line}": "" for line in _mounts(home)}
    return seen


def left(before: dict[str, str], home: Path | None, *, patience_s: float = 10.0) -> list[str]:
    """Return what of this session's is still there after `patience_s` seconds at most."""
    deadline = time.monotonic() + patience_s
    candidates = _ours(before, home)
    while candidates and time.monotonic() < deadline:
        time.sleep(0.2)
        candidates &= _ours(before, home)
    return sorted(candidates)


def nodes() -> dict[str, tuple[int, int, int]]:
    """Return {name: (uid, gid, mode)} of the host's nodes that sandboxes share."""
    states = {name: os.stat(f"/dev/{name}") for name in _NODES}
    return {name: (state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode)) for name, state in states.items()}


def _ours(before: dict[str, str], home: Path | None) -> set[str]:
    theirs = _of_others(home)
    return {what for what, sandbox in found(home).items() if what not in before and sandbox not in theirs}


def _of_others(home: Path | None) -> set[str]:
    """Return the ids of sandboxes that are recorded in run directories which are not this session's."""
    ids = set()
    for path in _all_ranges():
        directory = _read(path)
        if directory and (home is None or not directory.startswith(f"{home}/")):
            ids.add(os.path.basename(directory))
    return ids


def _inside(home: Path | None, name: str) -> list[Path]:
    directory = home / name if home else None
    return list(directory.iterdir()) if directory and directory.is_dir() else []


def _all_ranges() -> list[Path]:
    return [path for path in _RANGES.iterdir() if path.name.isdigit()] if _RANGES.is_dir() else []


def _ranges(home: Path | None) -> Iterator[tuple[Path, str]]:
    for path in _all_ranges():
        directory = _read(path)
        if home is not None and directory.startswith(f"{home}/"):
            yield path, os.path.basename(directory)


def _cgroups() -> Iterator[Path]:
    top = Path("/sys/fs/cgroup")
    for hierarchy in (top, *top.glob("*")):  # v2 alone is mounted on the directory itself
        base = hierarchy / "ringfence"
        if base.is_dir():
            yield from (path for path in base.iterdir() if path.is_dir())


def _processes() -> Iterator[tuple[str, str]]:
    for process in Path("/proc").glob("[0-9]*"):
        name, groups = _read(process / "comm").strip(), _read(process / "cgroup")
        inside = [line.partition("/ringfence/")[2] for line in groups.splitlines() if "/ringfence/" in line]
        if inside or name in _AGENTS:
            yield f"process {process.name} {name}", inside[0] if inside else ""


def _mounts(home: Path | None) -> Iterator[str]:
    for line in _read(Path("/proc/self/mountinfo")).splitlines():
        if "ringfence" in line or (home is not None and str(home) in line):
            yield line


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
