"""Control groups without a kernel: paths, conversions, and v2 and v1 interface files in kernel format."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.cgroup.group import Cgroup, leftovers
from ringfence.cgroup.layout import Layout, components, valid_id
from ringfence.cgroup.readings import flat, nested, number
from ringfence.cgroup.weight import shares_of_weight
from ringfence.errors import HostError

ALL = ("cpu", "cpuset", "io", "memory", "pids")

V2_FILES = {
    "cgroup.controllers": "cpuset cpu io memory pids\n",
    "cgroup.subtree_control": "\n",
    "cgroup.procs": "",
    "cpu.max": "150000 100000\n",
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\nnr_periods 3\n",
    "cpu.weight": "100\n",
    "cpuset.cpus": "0-1\n",
    "io.max": "254:0 rbps=52428800 wbps=max riops=1000 wiops=max\n8:0 rbps=max wbps=1 riops=max wiops=2\n",
    "io.stat": "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0\n8:0 rbytes=1 wbytes=2 rios=1\n",
    "memory.events": "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
    "memory.max": "268435456\n",
    "memory.peak": "1048576\n",
    "memory.swap.max": "0\n",
    "pids.max": "64\n",
    "pids.peak": "9\n",
}


def fake_v2(root: Path, group: str, files: dict[str, str]) -> Layout:
    """Write a v2 tree with the interface files of `group` and bare parents; return its layout."""
    place = root
    for part in ["", *components(group)]:
        place = place / part if part else place
        place.mkdir(exist_ok=True)
        for name in ("cgroup.controllers", "cgroup.subtree_control", "cgroup.procs"):
            (place / name).write_text(V2_FILES[name])
    for name, text in files.items():
        (place / name).write_text(text)
    return Layout("v2", mounts={}, unified=str(root), controllers=ALL)


def test_v2_files_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    """Usage, limits and kills come out of the v2 formats: flat keyed, nested keyed, "max"."""
    layout = fake_v2(tmp_path, "/ringfence/a", V2_FILES)
    group = Cgroup(layout, "/ringfence/a")
    assert group.usage() == {
        "cpu_s": 2.5,
        "memory_peak_bytes": 1048576,
        "io_read_bytes": 4097,
        "io_write_bytes": 8194,
        "pids_peak": 9,
    }
    assert group.oom_kills() == 2
    seen = group.observed()
    assert {name: value for name, (value, _) in seen.items()} == {
        "memory_bytes": 268435456,
        "swap_bytes": 0,
        "cpu_quota_us": 150000,
        "cpu_period_us": 100000,
        "cpu_weight": 100,
        "cpuset": "0-1",
        "pids": 64,
        "io": {"254:0": {"rbps": 52428800, "riops": 1000}, "8:0": {"wbps": 1, "wiops": 2}},
    }
    assert seen["cpu_weight"][1] == f"{tmp_path}/ringfence/a/cpu.weight"
    assert leftovers(layout) == ["a"]


def test_v2_no_limit_is_none_and_no_file_is_absent(tmp_path: Path) -> None:
    """ "max" is a limit of None; a control whose file is missing is not in the answer at all."""
    files = {"memory.max": "max\n", "cpu.max": "max 100000\n", "pids.max": "max\n", "io.max": ""}
    group = Cgroup(fake_v2(tmp_path, "/ringfence/a", files), "/ringfence/a")
    seen = {name: value for name, (value, _) in group.observed().items()}
    assert seen == {
        "memory_bytes": None,
        "cpu_quota_us": None,
        "cpu_period_us": 100000,
        "pids": None,
        "io": {},
    }
    assert group.usage()["cpu_s"] is None
    assert group.usage()["memory_peak_bytes"] is None


def test_v2_controllers_are_switched_on_on_the_way_down(tmp_path: Path) -> None:
    """create() writes what is available and not yet on into each parent's subtree_control, once."""
    layout = fake_v2(tmp_path, "/ringfence/a", {})
    (tmp_path / "cgroup.subtree_control").write_text("memory pids\n")
    Cgroup(layout, "/ringfence/a").create()
    # A plain file keeps what was written to it last over its beginning.
    assert (tmp_path / "cgroup.subtree_control").read_text().startswith("+cpu +cpuset +io")
    assert (tmp_path / "ringfence/cgroup.subtree_control").read_text() == "+cpu +cpuset +io +memory +pids"
    assert (tmp_path / "ringfence/a/cgroup.subtree_control").read_text() == "\n"


def test_v2_a_controller_that_does_not_arrive_is_an_error(tmp_path: Path) -> None:
    """A group without a controller that limits are needed from is refused, and the controller named."""
    layout = fake_v2(tmp_path, "/ringfence/a", {"cgroup.controllers": "cpu memory pids\n"})
    with pytest.raises(HostError, match="cpuset, io"):
        Cgroup(layout, "/ringfence/a").create()


def test_v1_files_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    """v1: memsw is memory and swap, -1 and the page-rounded maximum are "no limit", kills are summed."""
    files = {
        "cpu/cpu.shares": "1024\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "cpuacct/cpuacct.usage": "1500000000\n",
        "memory/memory.limit_in_bytes": "1048576\n",
        "memory/memory.memsw.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.max_usage_in_bytes": "4096\n",
        "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        "memory/inner/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "blkio/blkio.throttle.read_bps_device": "254:0 100\n",
        "blkio/blkio.throttle.io_service_bytes_recursive": "254:0 Read 7\n254:0 Write 8\nTotal 15\n",
        "pids/pids.max": "max\n",
    }
    for name, text in files.items():
        controller, _, rest = name.partition("/")
        file = tmp_path / controller / "ringfence/a" / rest
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    names = ("blkio", "cpu", "cpuacct", "memory", "pids")
    layout = Layout("v1", mounts={name: str(tmp_path / name) for name in names}, controllers=names)
    group = Cgroup(layout, layout.path("a"))
    assert {name: value for name, (value, _) in group.observed().items()} == {
        "memory_bytes": 1048576,
        "swap_bytes": None,
        "cpu_quota_us": None,
        "cpu_period_us": 100000,
        "cpu_weight": 1024,
        "pids": None,
        "io": {"254:0": {"rbps": 100}},
    }
    assert group.oom_kills() == 3
    assert group.usage() == {
        "cpu_s": 1.5,
        "memory_peak_bytes": 4096,
        "io_read_bytes": 7,
        "io_write_bytes": 8,
        "pids_peak": None,
    }


def test_hybrid_uses_the_v1_controllers(tmp_path: Path) -> None:
    """Beside v1 the v2 mount is only tidied up: no controller is looked for there."""
    layout = Layout(
        "hybrid", mounts={"memory": "/m", "cpu": "/c"}, unified="/u", controllers=("cpu", "memory")
    )
    assert layout.mount_of("memory") == "/m"
    assert layout.mount_of("pids") == ""
    assert layout.hierarchies() == ["/c", "/m", "/u"]


def test_a_layout_survives_json() -> None:
    """What a plan stores gives the same layout again; damage is a HostError, not a crash."""
    layout = Layout("hybrid", mounts={"cpu": "/c"}, unified="/u", controllers=("cpu",), base="/x/ringfence")
    again = Layout.from_dict(layout.as_dict())
    assert again.as_dict() == layout.as_dict()
    damaged: list[dict[str, object]] = [
        {},
        {"mounts": [], "controllers": []},
        {"mounts": {}, "controllers": 5},
    ]
    for damage in damaged:
        with pytest.raises(HostError):
            Layout.from_dict(damage)


def test_the_facts_of_a_host_make_a_layout() -> None:
    """The host room's facts have the names that Layout takes, though neither room imports the other."""
    import msgspec

    from ringfence.cgroup.layout import CALLER_LEAF
    from ringfence.host import cgroups
    from ringfence.host.facts import CgroupFacts

    facts = CgroupFacts(version="v2", unified="/u", controllers=("cpu",), base="/a.scope/ringfence")
    layout = Layout.from_dict(msgspec.to_builtins(facts))
    assert (layout.version, layout.unified, layout.controllers) == ("v2", "/u", ("cpu",))
    assert layout.path("b") == "/a.scope/ringfence/b"
    assert f"/{CALLER_LEAF}" == cgroups._CALLER_LEAF


@pytest.mark.parametrize("path", ["", "/", "relative", "/a/../b", "/..", "/a/./b", "/a\0b"])
def test_paths_that_could_leave_the_hierarchy(path: str) -> None:
    """Only plain absolute paths name a group."""
    with pytest.raises(HostError):
        Cgroup(Layout("v1", mounts={}), path)


@given(st.text(max_size=80))
def test_ids_are_names_and_nothing_else(text: str) -> None:
    """Whatever is accepted as an id is one path step of harmless characters."""
    try:
        accepted = valid_id(text)
    except HostError:
        return
    assert accepted == text
    assert 1 <= len(text) <= 64
    assert set(text) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_shares_and_weights() -> None:
    """The default is the default, and ratios are kept."""
    assert [shares_of_weight(weight) for weight in (1, 100, 10_000)] == [10, 1024, 102_400]


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_larger_weight_never_gets_fewer_shares(one: int, other: int) -> None:
    """Order is kept, inside the kernel's range."""
    low, high = sorted((one, other))
    assert 2 <= shares_of_weight(low) <= shares_of_weight(high) <= 1 << 18


@given(st.text(max_size=200))
def test_no_file_content_breaks_the_readers(text: str) -> None:
    """Unexpected text in a control file is no value, never an exception."""
    number(text)
    flat(text)
    nested(text)
