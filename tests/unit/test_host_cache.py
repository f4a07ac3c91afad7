"""Kept facts: believed only when the file is safely ours and the key is today's."""

import os
from pathlib import Path

import pytest

from ringfence.host import cache, detect
from ringfence.host.facts import Host


class Counter:
    """Stands in for the slow detection and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> Host:
        self.asked += 1
        return Host(boot_id=f"detected {self.asked}")


@pytest.fixture
def detection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter:
    """A counting detection, and state and run directories of the test's own."""
    counter = Counter()
    monkeypatch.setattr(detect, "detect", counter)
    for name in ("state", "run"):
        (tmp_path / name).mkdir(mode=0o700)
        monkeypatch.setenv(f"RINGFENCE_{name.upper()}_DIR", str(tmp_path / name))
    return counter


def test_facts_are_kept(detection: Counter, tmp_path: Path) -> None:
    """The second call reads the file, which nobody else can read or write."""
    file = tmp_path / "facts"
    first = cache.detect_cached(str(file))
    assert cache.detect_cached(str(file)) == first
    assert detection.asked == 1
    assert file.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts", "run", "state"]


@pytest.mark.parametrize(
    "damage", ["mode", "empty", "cut", "garbage", "key", "link", "hardlink", "fifo", "large"]
)
def test_anything_odd_means_detecting_again(damage: str, detection: Counter, tmp_path: Path) -> None:
    """A file that others could have changed, that is damaged or old is not believed and does not hang."""
    file = tmp_path / "facts"
    cache.detect_cached(str(file))
    content = file.read_bytes()
    if damage == "mode":
        file.chmod(0o644)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(content[:-9])
    elif damage == "garbage":
        file.write_bytes(content.split(b"\n")[0] + b"\n\xff\x00{")
    elif damage == "key":
        file.write_bytes(b"x" + content)
    elif damage == "link":
        file.rename(tmp_path / "else")
        file.symlink_to(tmp_path / "else")
    elif damage == "hardlink":
        os.link(file, tmp_path / "else")
    elif damage == "large":
        file.write_bytes(content + b" " * (2 << 20))
    else:
        file.unlink()
        os.mkfifo(file, 0o600)
    assert cache.detect_cached(str(file)).boot_id == "detected 2"


def test_a_place_that_cannot_be_written_is_no_error(detection: Counter, tmp_path: Path) -> None:
    """Without a place to keep facts they are detected each time."""
    file = tmp_path / "absent" / "facts"
    cache.detect_cached(str(file))
    cache.detect_cached(str(file))
    assert detection.asked == 2


def test_the_key_knows_a_new_runtime(
    detection: Counter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another crun on PATH, or the same path with another file, is another key."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    before = cache.host_key()
    assert cache.host_key() == before
    program = tmp_path / "crun"
    program.write_text("one")
    program.chmod(0o755)
    with_one = cache.host_key()
    assert with_one != before
    program.write_text("more")
    assert cache.host_key() != with_one


def test_the_key_knows_the_limits_of_this_process(detection: Counter) -> None:
    """Facts of a process with other hard limits are not ours."""
    import resource

    before = cache.host_key()
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 12345 if hard < 0 else max(hard - 1, 0)))
        os._exit(0 if cache.host_key() != before else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_the_hot_path_imports_nothing_heavy() -> None:
    """host_key and the cgroup room start without msgspec, typing, dataclasses, pathlib or subprocess."""
    import subprocess
    import sys

    program = (
        "import sys; before = set(sys.modules)\n"
        "import ringfence.host.cache, ringfence.cgroup.group, ringfence.cgroup.weight\n"
        "ringfence.host.cache.host_key()\n"
        "heavy = {'msgspec', 'typing', 'dataclasses', 'pathlib', 'subprocess', 'logging', 're', 'enum'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    source = str(Path(cache.__file__).parents[2])
    found = subprocess.run(
        ["/usr/bin/env", f"PYTHONPATH={source}", sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "[]\n"


def test_the_key_reads_files_that_the_kernel_gives_page_by_page() -> None:
    """The end of a long list, such as that of AppArmor's profiles, is part of the key too."""
    assert len(cache._text("/proc/kallsyms")) > 1 << 16


def test_the_key_knows_a_device_that_comes_and_goes(tmp_path: Path) -> None:
    """A device node that appears, may not be opened any more or is made anew is another one for the key."""
    device = tmp_path / "kvm"
    absent = cache._device(str(device))
    device.touch(0o600)
    there = cache._device(str(device))
    device.chmod(0o000)
    closed = cache._device(str(device))
    (tmp_path / "other").touch(0o600)
    (tmp_path / "other").rename(device)
    again = cache._device(str(device))
    assert len({absent, there, closed, again}) == 4
    assert cache._device(str(device)) == again
