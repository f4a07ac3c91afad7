"""CPU weight (cgroup v2, 1..10000, default 100) as CPU shares (cgroup v1, 2..262144, default 1024).

Runtimes convert the other way by formulas that changed over time (crun 1.23, runc 1.3.2), so a plan for v2 asks for
``unified: {"cpu.weight": ...}`` and never for shares.
"""

_SHARES_MIN = 2
_SHARES_MAX = 1 << 18


def shares_of_weight(weight: int) -> int:
    """Return the cpu.shares that give a policy's `weight` (1..10000) its proportion on v1; 100 -> 1024.

    Linear, so ratios between sandboxes are the same on v1 and v2; systemd maps CPUWeight= the same way.
    Source: https://github.com/systemd/systemd/blob/v255/src/core/cgroup.c (cgroup_cpu_weight_to_shares)
    """
    return max(_SHARES_MIN, min(_SHARES_MAX, weight * 1024 // 100))
