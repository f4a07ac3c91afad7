"""A staging operation in words."""

from __future__ import annotations

from ringfence.errors import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Op

_IDS = {
    "image": "owners as on disk",
    "owner": "its owner is the job's user",
    "none": "owners not mapped",
}


def describe(op: Op) -> str:
    """Return one line that says what `op` does."""
    if op["op"] == "hide":
        return f"take the mount {op['path']} out of sight"
    where = one_line(op["at"])
    if op["op"] == "tmpfs":
        return f"tmpfs of {op['size_bytes']} bytes and {op['inodes']} inodes on {where}, mode {op['mode']:o}"
    if op["op"] == "directory":
        return f"directory {where}, mode {op['mode']:o}, owner {op['owner']}"
    if op["op"] == "file":
        return f"file {where} of {len(op['text'])} characters"
    if op["op"] == "host-file":
        return f"file {where}, a copy of the host's {one_line(op['source'])}"
    if op["op"] == "symlink":
        return f"symlink {where} -> {one_line(op['target'])}"
    if op["op"] == "node":
        return f"character device {op['number']} as {where}, of the {op['owner']}'s alone"
    if op["op"] == "initrd":
        return f"the guest's first file system as {where}, with {len(op['modules'])} modules"
    if op["op"] == "agent":
        return f"the agent as {where}"
    if op["op"] == "overlay":
        way = f"writes to {op['upper']}" if op["upper"] else "read-only"
        return f"overlay of {' over '.join(op['lower'])} on {where}, {way}"
    if op["op"] == "share":
        return f"show {op['source']} on {where} as well"
    way = "read-only" if op["read_only"] else "WRITABLE"
    return f"bind {one_line(op['source'])} on {where}, {way}, {_IDS[op['ids']]}"
