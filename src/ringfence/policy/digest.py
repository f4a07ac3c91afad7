"""The identity of a policy: equal in effect is equal in digest, however it was written."""

from __future__ import annotations

import hashlib

from ringfence.policy.dump import dump_json
from ringfence.policy.model import Policy


def digest(policy: Policy) -> str:
    """Return ``sha256:`` and the hash of the canonical JSON of the resolved policy."""
    return f"sha256:{hashlib.sha256(dump_json(policy).encode()).hexdigest()}"
