"""The speed of the time stamp counter: only what says it for certain is believed."""

import pytest

from ringfence.runtime.microvm.kernels import clock

CPU = "processor\t: 0\nmodel name\t: Some CPU{}\ncpu MHz\t\t: {}\nprocessor\t: 1\n"
BASE = "/sys/devices/system/cpu/cpu0/cpufreq/base_frequency"
DRIVER = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver"


@pytest.mark.parametrize(
    ("files", "khz"),
    [
        ({"/proc/cpuinfo": CPU.format("", "2445.406")}, 2445406),
        ({"/proc/cpuinfo": CPU.format(" @ 2.40GHz", "800.001"), DRIVER: "intel_pstate\n"}, 2400000),
        ({"/proc/cpuinfo": CPU.format("", "800.001"), DRIVER: "amd-pstate\n"}, 0),
        ({"/proc/cpuinfo": CPU.format("", "800.001"), DRIVER: "x\n", BASE: "2100000\n"}, 2100000),
        ({"/proc/cpuinfo": "rubbish"}, 0),
        ({}, 0),
    ],
    ids=["fixed", "by-name", "changing", "base", "rubbish", "nothing"],
)
def test_the_counter_is_not_taken_for_the_speed_of_the_moment(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], khz: int
) -> None:
    """Where the CPU changes its speed, only the base frequency or the one in its name counts."""
    monkeypatch.setattr(clock, "_read", lambda path: files.get(path, ""))
    assert clock.tsc_khz() == khz


def test_this_host_says_nothing_or_something_sensible() -> None:
    """Between 0.5 and 10 GHz."""
    assert clock.tsc_khz() == 0 or 500_000 < clock.tsc_khz() < 10_000_000
