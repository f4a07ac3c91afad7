"""Control groups on the real kernel: its own layout with controllers, v2 with its core, real runtimes in them."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ringfence.cgroup.group import Cgroup, leftovers
from ringfence.cgroup.layout import Layout
from ringfence.errors import HostError
from ringfence.host.cgroups import cgroup_facts
from ringfence.host.facts import CgroupFacts

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: groups outside a delegated subtree")

FACTS = cgroup_facts()
V2 = FACTS.version == "v2"
needs_v2 = pytest.mark.skipif(not FACTS.unified, reason="needs a cgroup v2 mount")
FORKER = "import os, time\nfor _ in range(3): os.fork()\ntime.sleep(60)"
FORK_BOMB = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"


def layout_of(facts: CgroupFacts) -> Layout:
    """Return the layout below a base of this test run alone."""
    return Layout.from_dict({**msgspec.to_builtins(facts), "base": f"/ringfence-test-{os.getpid()}"})


def v2_core() -> Layout:
    """Return a layout of the v2 mount that asks for no controller: what this host can do on v2 for real."""
    return Layout("v2", mounts={}, unified=FACTS.unified, base=f"/ringfence-test2-{os.getpid()}")


@pytest.fixture(params=["v1", "v2"])
def layout(request: pytest.FixtureRequest) -> Iterator[Layout]:
    """One layout after the other; whatever a test made in it is gone afterwards."""
    if request.param == "v1" and FACTS.version not in ("v1", "hybrid"):
        pytest.skip("needs cgroup v1 controllers")
    if request.param == "v2" and not FACTS.unified:
        pytest.skip("needs a cgroup v2 mount")
    yield from tidy(layout_of(FACTS) if request.param == "v1" else v2_core())


@pytest.fixture
def own() -> Iterator[Layout]:
    """The layout of this host, with the controllers that it has."""
    if FACTS.version == "none":
        pytest.skip("needs control groups")
    yield from tidy(layout_of(FACTS))


def tidy(layout: Layout) -> Iterator[Layout]:
    """Hand out `layout`; remove its groups and its base afterwards."""
    yield layout
    for sandbox_id in leftovers(layout):
        group = Cgroup(layout, layout.path(sandbox_id))
        group.kill()
        group.remove()
    Cgroup(layout, layout.base).remove()
    assert not Cgroup(layout, layout.base).exists()


def start_in(group: Cgroup, program: str) -> "subprocess.Popen[bytes]":
    """Start a Python program as a member of `group` in all hierarchies, in its own session."""
    places = [f"{mount}{group.path}/cgroup.procs" for mount in group.layout.hierarchies()]
    files = [place for place in places if os.path.exists(place)]
    join = f"import os\nfor file in {files!r}: open(file, 'w').write('0')\n"
    text = f"{join}os.write(1, b'in')\nos.close(1)\n{program}"
    process = subprocess.Popen(
        ["/usr/bin/python3", "-S", "-E", "-c", text], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.read(2) == b"in"
    process.stdout.close()
    return process


def control(group: Cgroup, controller: str, name: str) -> Path:
    """Return a control file of `group`."""
    return Path(f"{group.layout.mount_of(controller)}{group.path}/{name}")


def until_procs(group: Cgroup, count: int) -> list[int]:
    """Wait until `group` has `count` processes."""
    deadline = time.monotonic() + 10
    while len(found := group.procs()) < count:
        assert time.monotonic() < deadline, found
        time.sleep(0.002)
    return found


def test_create_makes_the_group_and_remove_takes_it_away(layout: Layout) -> None:
    """create() makes the directories the kernel shows, twice is fine, remove() leaves none, twice is fine."""
    group = Cgroup(layout, layout.path("a1"))
    assert not group.exists()
    group.create()
    group.create()
    made = [mount for mount in layout.hierarchies() if os.path.isdir(mount + group.path)]
    assert made == list(dict.fromkeys([*layout.mounts.values()] or [layout.unified]))
    assert leftovers(layout) == ["a1"]
    group.remove()
    group.remove()
    assert not group.exists()
    assert leftovers(layout) == []
    assert group.procs() == []


def test_kill_ends_all_processes_of_the_group(layout: Layout) -> None:
    """kill() ends parents and children, and remove() works right after it."""
    group = Cgroup(layout, layout.path("a2"))
    group.create()
    process = start_in(group, FORKER)
    pids = until_procs(group, 8)
    assert process.pid in pids
    group.kill()
    assert group.procs() == []
    assert process.wait(5) == -signal.SIGKILL
    group.remove()
    assert not group.exists()


def test_kill_reaches_a_frozen_group(layout: Layout) -> None:
    """A frozen process is killed, too; SIGKILL alone would wait for ever."""
    group = Cgroup(layout, layout.path("a3"))
    group.create()
    process = start_in(group, "import time; time.sleep(60)")
    v2 = layout.version == "v2"
    freezer = layout.unified if v2 else layout.mounts["freezer"]
    file, frozen = ("cgroup.freeze", "1") if v2 else ("freezer.state", "FROZEN")
    Path(f"{freezer}{group.path}/{file}").write_text(frozen)
    group.kill()
    assert process.wait(5) == -signal.SIGKILL


def test_kill_stops_a_fork_bomb(own: Layout) -> None:
    """Processes that fork all the time do not outrun kill()."""
    group = Cgroup(own, own.path("a4"))
    group.create()
    control(group, "pids", "pids.max").write_text("100")
    control(group, "cpu", "cpu.max" if V2 else "cpu.cfs_quota_us").write_text("50000")
    process = start_in(group, FORK_BOMB)
    until_procs(group, 90)
    group.kill()
    assert group.procs() == []
    process.wait(5)


def test_kill_and_remove_cover_groups_below(layout: Layout) -> None:
    """A group that something made inside ours is emptied and removed with it."""
    group = Cgroup(layout, layout.path("a5"))
    below = Cgroup(layout, layout.path("a5") + "/inner/deep")
    below.create()
    process = start_in(below, "import time; time.sleep(60)")
    assert group.procs() == [process.pid]
    group.kill()
    process.wait(5)
    group.remove()
    assert not group.exists()


def test_remove_does_not_touch_a_living_group(layout: Layout) -> None:
    """remove() without kill() says who is still there, and kills nobody."""
    group = Cgroup(layout, layout.path("a6"))
    group.create()
    process = start_in(group, "import time; time.sleep(60)")
    with pytest.raises(HostError, match=str(process.pid)):
        group.remove(timeout_s=0.05)
    assert process.poll() is None
    group.kill()
    process.wait(5)


def test_a_link_in_the_way_is_not_followed(layout: Layout, tmp_path: Path) -> None:
    """A path step that is a symbolic link is refused: groups stay inside their hierarchy."""
    (tmp_path / "real" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    fake = Layout("v2", mounts={}, unified=str(tmp_path), base="/link")
    assert not Cgroup(fake, "/link/x").exists()
    assert Cgroup(fake, "/real/x").exists()
    assert leftovers(fake) == []


def test_usage_and_oom_kills_are_counted(own: Layout) -> None:
    """CPU time, peak memory and kills for lack of memory come from the kernel's counters."""
    group = Cgroup(own, own.path("a7"))
    group.create()
    limit = control(group, "memory", "memory.max" if V2 else "memory.limit_in_bytes")
    limit.write_text(str(48 << 20))
    busy = "import time; end = time.process_time() + 0.2; held = bytearray(20 << 20)\n"
    process = start_in(group, busy + "while time.process_time() < end: pass")
    assert process.wait(20) == 0
    used = group.usage()
    assert used["cpu_s"] is not None
    assert 0.2 <= used["cpu_s"] < 5
    assert used["memory_peak_bytes"] is not None
    assert 20 << 20 <= used["memory_peak_bytes"] <= 48 << 20
    assert group.oom_kills() == 0
    eater = start_in(group, "held = []\nwhile True: held.append(bytearray(4 << 20))")
    assert eater.wait(20) == -signal.SIGKILL
    assert group.oom_kills() == 1


def bundle(where: Path, group: str) -> Path:
    """Write an OCI bundle whose job sleeps; every limit that can be read back is set."""
    root = where / "rootfs"
    for name in ("dev", "proc", "bin"):
        (root / name).mkdir(parents=True)
    source = where / "sleep.c"
    source.write_text("#include <unistd.h>\nint main(void) { for (;;) pause(); }\n")
    compiler = shutil.which("musl-gcc") or "gcc"
    subprocess.run([compiler, "-static", "-o", root / "bin/sleep", source], check=True)
    device = device_number()
    rate = [{"major": os.major(device), "minor": os.minor(device), "rate": 1 << 20}]
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["/bin/sleep"],
            "cwd": "/",
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 64}],
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {
            "cgroupsPath": group,
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "network", "ipc", "uts")],
            "resources": {
                "devices": [{"allow": False, "access": "rwm"}],
                "memory": {"limit": 64 << 20, "swap": 80 << 20},
                "cpu": {**({} if V2 else {"shares": 512}), "quota": 50_000, "period": 100_000, "cpus": "0"},
                **({"unified": {"cpu.weight": "512"}} if V2 else {}),
                "pids": {"limit": 32},
                "blockIO": {"throttleReadBpsDevice": rate, "throttleWriteIOPSDevice": rate},
            },
        },
    }
    (where / "config.json").write_text(json.dumps(config))
    return where


def device_number() -> int:
    """Return the number of a disk that can be throttled."""
    from ringfence.host.storage import block_device, filesystem_of

    disk = block_device(filesystem_of("/"))
    if disk is None:
        pytest.skip("needs a root file system on a disk")
    major, _, minor = disk.number.partition(":")
    return os.makedev(int(major), int(minor))


def runtime_command(name: str) -> list[str]:
    """Return the command before a runtime's own arguments; crun must not see a v2 mount beside v1 ones."""
    if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin"):
        pytest.skip(f"needs {name}")
    if name == "crun" and FACTS.hybrid_v2_mount:
        hide = f'umount {FACTS.hybrid_v2_mount} && exec "$@"'
        return ["unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh", name]
    return [name]


def state_of(pid: int) -> str:
    """Return the letter of the state of a process; "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@pytest.mark.parametrize("before", [True, False], ids=["group made before", "group made by the runtime"])
@pytest.mark.parametrize("name", ["crun", "runc"])
def test_limits_of_a_real_container_are_read_back(
    name: str, before: bool, own: Layout, tmp_path: Path
) -> None:
    """What a runtime set is observed control by control; kill and remove clean up without `delete`."""
    group = Cgroup(own, own.path(f"{name}-{int(before)}"))
    if before:
        group.create()
    where = bundle(tmp_path, group.path)
    state = ["--root", str(tmp_path / "state")]
    command = runtime_command(name)
    device = device_number()
    disk = f"{os.major(device)}:{os.minor(device)}"
    subprocess.run(
        [*command, *state, "run", "-d", "--pid-file", where / "pid", "-b", where, "t1"],
        check=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    pid = int((where / "pid").read_text())
    assert group.procs() == [pid]
    seen = group.observed()
    assert {key: value for key, (value, _) in seen.items()} == {
        "memory_bytes": 64 << 20,
        "swap_bytes": 16 << 20,
        "cpu_quota_us": 50_000,
        "cpu_period_us": 100_000,
        "cpu_weight": 512,
        "cpuset": "0",
        "pids": 32,
        "io": {disk: {"rbps": 1 << 20, "wiops": 1 << 20}},
    }
    assert seen["cpu_weight"][1] == str(control(group, "cpu", "cpu.weight" if V2 else "cpu.shares"))
    assert all(os.path.exists(file) for _, file in seen.values() if "*" not in file)
    group.kill()
    group.remove()
    assert not group.exists()
    assert state_of(pid) in ("", "Z")
    left = [mount for mount in own.hierarchies() if os.path.exists(mount + group.path)]
    assert left == []


@needs_v2
def test_a_group_of_v2_that_lacks_a_controller_is_refused() -> None:
    """create() does not go on when a controller that was asked for does not arrive in the group."""
    layout = Layout("v2", mounts={}, unified=FACTS.unified, controllers=("nosuch",), base=v2_core().base)
    for _ in tidy(layout):
        with pytest.raises(HostError, match="does not get: nosuch"):
            Cgroup(layout, layout.path("a8")).create()


def test_v2_observed_says_nothing_it_cannot_read(layout: Layout) -> None:
    """Values of controllers that are not there are absent, not zero."""
    group = Cgroup(layout, layout.path("a9"))
    assert group.observed() == {}
    assert group.oom_kills() == 0
    assert set(group.usage().values()) == {None}
