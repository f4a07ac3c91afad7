"""CPU weight (cgroup v2, 1..10000, default 100) and CPU shares (cgroup v1, 2..262144, default 1024)."""

_WEIGHT_MAX = 10_000
_SHARES_MIN = 2
_SHARES_MAX = 1 << 18


def shares_of_weight(weight: int) -> int:
    """Return the cpu.shares that give a policy's `weight` (1..10000) its proportion on v1; 100 -> 1024.

    Linear, so ratios between sandboxes are the same on v1 and v2; systemd maps CPUWeight= the same way.
    Source: https://github.com/systemd/systemd/blob/v255/src/core/cgroup.c (cgroup_cpu_weight_to_shares)
    """
    return max(_SHARES_MIN, min(_SHARES_MAX, weight * 1024 // 100))


def weight_of_shares(shares: int) -> int:
    """Return the cpu.weight that crun < 1.23 and runc < 1.3.2 write on v2 for OCI `shares`; 1024 -> 39.

    It maps the range [2..262144] onto [1..10000] and so misses the default. Later versions use another
    formula, `weight_of_shares_later`: a plan for v2 asks for ``unified: {"cpu.weight": ...}`` instead.
    Source: https://github.com/containers/crun/blob/1.8.1/crun.1.md#cpu-controller
    """
    return 1 + (max(_SHARES_MIN, min(_SHARES_MAX, shares)) - 2) * (_WEIGHT_MAX - 1) // (_SHARES_MAX - 2)


def weight_of_shares_later(shares: int) -> int:
    """Return the cpu.weight that crun >= 1.23 and runc >= 1.3.2 write on v2 for OCI `shares`; 1024 -> 100.

    With L = log2(shares) the weight is ceil(10 ** ((L*L + 125*L) / 612 - 7/34)).
    Source: https://github.com/opencontainers/cgroups/pull/20 and https://github.com/containers/crun/pull/1767
    """
    import math

    if shares <= _SHARES_MIN:
        return 1
    if shares >= _SHARES_MAX:
        return _WEIGHT_MAX
    log = math.log2(shares)
    return math.ceil(10 ** ((log * log + 125 * log) / 612 - 7 / 34))
