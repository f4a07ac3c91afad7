"""How fast this host's CPU counts time, for guests that cannot find it out: emulated, their kernel may hang at it."""

import re

_CPUFREQ = "/sys/devices/system/cpu/cpu0/cpufreq"


def tsc_khz() -> int:
    """Return the frequency of this host's time stamp counter in kHz, 0 when nothing here tells it for certain.

    Where the CPU changes its speed, the speed of the moment says nothing of the counter: it counts at the base one.
    """
    base = _read(f"{_CPUFREQ}/base_frequency")
    if base.strip().isdigit():
        return int(base)
    cpu = _read("/proc/cpuinfo")
    named = re.search(r"^model name\s*:.* @ (\d+)\.(\d\d)GHz$", cpu, re.M)
    fixed = (
        None if _read(f"{_CPUFREQ}/scaling_driver") else re.search(r"^cpu MHz\s*: (\d+)\.(\d{3})$", cpu, re.M)
    )
    if fixed:
        return int(fixed[1] + fixed[2])
    return int(named[1] + named[2]) * 10_000 if named else 0


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(1 << 14)
    except OSError:
        return ""
