"""How a policy may write the names of capabilities."""

from __future__ import annotations

import difflib

from ringfence.errors import PolicyError
from ringfence.linux.capabilities import NAMES
from ringfence.policy.units import show

CAPABILITIES = NAMES


def canonical(name: object) -> str:
    """Return ``CAP_X`` for ``CAP_X``, ``X`` or lower case; raises PolicyError with the nearest known."""
    text = name.upper() if isinstance(name, str) else ""
    full = text if text.startswith("CAP_") else f"CAP_{text}"
    if full in CAPABILITIES:
        return full
    known = [each.removeprefix("CAP_") for each in CAPABILITIES]
    close = difflib.get_close_matches(full.removeprefix("CAP_"), known, 1)
    hint = f"did you mean CAP_{close[0]}?" if close else "write each one out, for example NET_BIND_SERVICE"
    raise PolicyError(f"{show(name)} is not a capability", hint=hint)
