"""Kernel parameters: only those of which every sandbox has its own."""

from __future__ import annotations

import difflib
import re

from ringfence.errors import PolicyError

# ipc_namespaces(7) lists these and fs.mqueue.*; network_namespaces(7) stands for net.*.
_IPC = ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
NAME_PATTERN = rf"^(?:kernel\.(?:{'|'.join(_IPC)})|fs\.mqueue\.[a-z0-9_]+|net(?:\.[A-Za-z0-9_-]+)+)$"


def check_name(name: str) -> None:
    """Raise PolicyError unless each sandbox has its own `name`, so that setting it cannot touch the host."""
    if re.fullmatch(NAME_PATTERN, name):
        return
    if "/" in name:
        raise PolicyError(
            f"{name!r} is not a kernel parameter", hint="write it with dots, as in net.core.somaxconn"
        )
    close = difflib.get_close_matches(name, [f"kernel.{ipc}" for ipc in _IPC], 1, 0.85)
    raise PolicyError(
        f"kernel parameter {name!r} belongs to the whole host and not to one sandbox",
        hint=f"did you mean {close[0]}?"
        if close
        else "settable are kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.*, net.*",
    )
