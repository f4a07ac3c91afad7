"""The names of Linux capabilities, in the order of their numbers in linux/capability.h."""

from __future__ import annotations

import difflib

from ringfence.errors import PolicyError
from ringfence.policy.units import show

_NAMES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
PERFMON BPF CHECKPOINT_RESTORE
"""
CAPABILITIES = tuple(f"CAP_{name}" for name in _NAMES.split())


def canonical(name: object) -> str:
    """Return ``CAP_X`` for ``CAP_X``, ``X`` or lower case; raises PolicyError with the nearest known."""
    text = name.upper() if isinstance(name, str) else ""
    full = text if text.startswith("CAP_") else f"CAP_{text}"
    if full in CAPABILITIES:
        return full
    close = difflib.get_close_matches(full.removeprefix("CAP_"), _NAMES.split(), 1)
    hint = f"did you mean CAP_{close[0]}?" if close else "write each one out, for example NET_BIND_SERVICE"
    raise PolicyError(f"{show(name)} is not a capability", hint=hint)
