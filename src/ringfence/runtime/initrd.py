"""The first file system of a guest: the agent as its init, a console, and what modules the kernel lacks.

A cpio archive in the "newc" form, not compressed: the VMM copies it into memory, and the guest would only spend time
on unpacking it. The same parts give the same bytes, whoever builds it and when.
Source: https://docs.kernel.org/driver-api/early-userspace/buffer-format.html
"""

from __future__ import annotations

import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_NAME = 63
_MOST_MODULES = 64  # the guest reads a list of 4095 bytes at most
_CONSOLE = (5, 1)
_END = "TRAILER!!!"


def initrd(agent: bytes, modules: Sequence[tuple[str, bytes]] = ()) -> bytes:
    """Return the archive with `agent` as ``/init`` and `modules`, (file name, content), to be loaded in their order.

    Modules are plain object files, not compressed ones. Raises ValueError for a name that is none or comes twice.
    """
    names = [name for name, _ in modules]
    if len(names) > _MOST_MODULES or len(set(names)) != len(names):
        raise ValueError(
            f"{len(names)} modules, {len(set(names))} names; at most {_MOST_MODULES} can be loaded"
        )
    for name in names:
        if not _is_module(name):
            raise ValueError(f"{name!r} is no name of a module")
    entries = [
        ("dev", stat.S_IFDIR | 0o755, b"", (0, 0)),
        # The kernel opens it for init before anything is mounted: the only place for an error this early.
        ("dev/console", stat.S_IFCHR | 0o600, b"", _CONSOLE),
        ("init", stat.S_IFREG | 0o755, agent, (0, 0)),
    ]
    if modules:
        entries.append(("modules", stat.S_IFDIR | 0o755, b"", (0, 0)))
        entries += [(f"modules/{name}", stat.S_IFREG | 0o644, content, (0, 0)) for name, content in modules]
        listed = "".join(f"{name}\n" for name in names).encode()
        entries.append(("modules.list", stat.S_IFREG | 0o644, listed, (0, 0)))
    entries.append((_END, 0, b"", (0, 0)))
    return b"".join(
        _entry(place, name, mode, content, device)
        for place, (name, mode, content, device) in enumerate(entries, start=1)
    )


def _is_module(name: str) -> bool:
    stem = name.removesuffix(".ko").replace("_", "").replace("-", "")
    return name.endswith(".ko") and stem.isascii() and stem.isalnum() and len(name) <= _MOST_NAME


def _entry(number: int, name: str, mode: int, content: bytes, device: tuple[int, int]) -> bytes:
    path = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
