"""Ringfence: run untrusted code with least privilege and prove what the kernel enforced.

result = ringfence.run(["python3", "-c", "print(1)"], policy="untrusted", timeout=10)
result.exit_status, result.stdout, result.usage, result.proof
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.errors import RingfenceError
    from ringfence.sandbox.result import Result, Usage
    from ringfence.sandbox.run import run

__all__ = ["Result", "RingfenceError", "Usage", "run"]

_HOMES = {
    "Result": "ringfence.sandbox.result",
    "RingfenceError": "ringfence.errors",
    "Usage": "ringfence.sandbox.result",
    "run": "ringfence.sandbox.run",
}


def __getattr__(name: str) -> object:
    # Lazy (PEP 562): `ringfence --help` must not pay for what it does not use.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ringfence' has no attribute {name!r}")
