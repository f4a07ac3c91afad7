"""Lists of CPUs as the kernel writes them: "0-3,6". See "List format" in cpuset(7)."""

_MOST = 8192  # NR_CPUS of the largest kernels


def cpus_of(text: str) -> frozenset[int]:
    """Return the numbers in a list such as "0-3,6"; anything that is no list is the empty set."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal()) or int(last) >= _MOST or int(first) > int(last):
            return frozenset()
        found.update(range(int(first), int(last) + 1))
    return frozenset(found)
