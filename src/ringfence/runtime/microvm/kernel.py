"""Which guest kernel a microVM boots. On the way of every run at this tier: imports only `os` until one is read."""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.linux.paths import image_states

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.runtime.microvm.kernels.store import Kernel

FETCH = "ringfence kernel fetch"
# Beside the kernels, in the same directory.
DEFAULT, LOCK = "default", "lock"


def kernels_dir(state: str, *below: str) -> str:
    """Return the directory of kernels in the state directory `state`, or what lies `below` in it."""
    return os.path.join(state, "kernels", *below)


def find_kernel(state: str, name: str = "") -> Kernel:
    """Return the kernel `name`, which may be the beginning of one name, or with "" the default one.

    A user without kernels gets root's, as with images. Raises HostError when there is none, or several begin so.
    """
    from ringfence.runtime.microvm.kernels.store import read

    return read(*_locate(state, name))


def kernel_name(state: str, name: str = "") -> str:
    """Return the full name of what `find_kernel` would find: it ends with a digest, so it can stand in a key.

    Raises HostError like `find_kernel`.
    """
    return _locate(state, name)[1]


def _locate(state: str, name: str) -> tuple[str, str]:
    """Return the state directory that has the kernel, and the kernel's full name."""
    for place in image_states(state):
        found = match(place, name) if name else default(place)
        if found:
            return place, found
    if name:
        raise HostError(f"no kernel {name!r}", hint="'ringfence kernel ls' lists them")
    chosen = any(names(place) for place in image_states(state))
    raise HostError(
        "no kernel for virtual machines is chosen" if chosen else "no kernel for virtual machines is here",
        hint="choose one with: ringfence kernel use NAME" if chosen else f"get one with: {FETCH}",
    )


def default(state: str) -> str:
    """Return the name of the default kernel of `state`, "" when there is none."""
    try:
        name = os.readlink(kernels_dir(state, DEFAULT))
    except OSError:
        return ""
    return name if is_name(name) and os.path.isdir(kernels_dir(state, name)) else ""


def match(state: str, name: str) -> str:
    """Return the one kernel of `state` that is called so or begins so, "" when there is none; raises HostError."""
    there = names(state)
    found = [name] if name in there else [one for one in there if one.startswith(name)]
    if len(found) > 1:
        raise HostError(f"{name!r} is the beginning of {len(found)} kernels", hint="give more of it")
    return found[0] if found else ""


def names(state: str) -> list[str]:
    """Return the names of the kernels of `state`, sorted."""
    try:
        there = os.listdir(kernels_dir(state))
    except OSError:
        return []
    return sorted(name for name in there if is_name(name) and os.path.isdir(kernels_dir(state, name)))


def is_name(name: str) -> bool:
    """Say whether a kernel may be called so: nothing that leads elsewhere, nothing hidden."""
    return "/" not in name and name[:1] not in ("", ".") and name not in (DEFAULT, LOCK)
