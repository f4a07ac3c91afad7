"""The facts of a host as a value, and the readers that make them from the kernel's texts."""

import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.host.cgroups import facts_from
from ringfence.host.cpulist import cpus_of
from ringfence.host.detect import (
    id_ranges,
    kernel_version,
    meminfo,
    namespace_permission,
    swap_total,
)
from ringfence.host.facts import CgroupFacts, GvisorFacts, Host, IdRange, Runtime, host_digest
from ringfence.host.places import find
from ringfence.host.runtimes import described, runtimes, trustworthy
from ringfence.host.storage import block_device, filesystem_in, idmapped

HYBRID = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
50 27 0:29 / /mnt/a\\040copy rw - cgroup cgroup rw,cpu,cpuacct
"""
CONTROLLERS = (
    "#subsys_name hierarchy num_cgroups enabled\ncpu 1 1 1\ncpuacct 1 1 1\nmemory 4 1 1\npids 8 1 1\n"
)


def test_a_host_survives_json_and_has_one_digest() -> None:
    """A Host written by hand is the same after JSON, and its digest depends on the facts alone."""
    host = Host(
        cpus="0-3",
        hard_limits={"nofile": 20000, "core": None},
        runtimes={"crun": Runtime(path="/usr/bin/crun", version=(1, 8, 1))},
        cgroup=CgroupFacts(version="v1", mounts={"cpu": "/c", "memory": "/m"}),
        kvm="unusable",
        kvm_reason="internal error",
        gvisor=GvisorFacts(platforms=("systrap",), reasons={"kvm": "no"}),
    )
    again = msgspec.json.decode(msgspec.json.encode(host), type=Host)
    assert again == host
    turned = msgspec.structs.replace(host, hard_limits={"core": None, "nofile": 20000})
    assert host_digest(again) == host_digest(host) == host_digest(turned)
    assert host_digest(msgspec.structs.replace(host, cpus="0-1")) != host_digest(host)


def test_hard_limits_decide_what_can_be_set() -> None:
    """Without CAP_SYS_RESOURCE a limit above the ceiling cannot be set; an unknown limit never can."""
    host = Host(hard_limits={"nofile": 100, "core": None})
    assert host.settable("nofile", 100)
    assert not host.settable("nofile", 101)
    assert host.settable("core", 1 << 40)
    assert not host.settable("stack", 1)
    strong = msgspec.structs.replace(host, capabilities=("CAP_SYS_RESOURCE",))
    assert strong.settable("nofile", 101)


def test_root_of_a_user_namespace_is_rootless() -> None:
    """Only uid 0 of the first user namespace with CAP_SYS_ADMIN is treated as the host's root."""
    root = Host(euid=0, capabilities=("CAP_SYS_ADMIN",))
    assert not root.rootless
    assert msgspec.structs.replace(root, initial_userns=False).rootless
    assert msgspec.structs.replace(root, capabilities=()).rootless
    assert msgspec.structs.replace(root, euid=1000).rootless


def test_a_hybrid_layout_is_read_from_mountinfo() -> None:
    """v1 controllers, shared mounts, named hierarchies and the v2 mount beside them are told apart."""
    facts = facts_from(HYBRID, "0::/\n", CONTROLLERS)
    assert facts.version == "hybrid"
    assert facts.mounts == {
        "cpu": "/sys/fs/cgroup/cpu,cpuacct",
        "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
        "memory": "/sys/fs/cgroup/memory",
        "name=systemd": "/sys/fs/cgroup/systemd",
    }
    assert facts.unified == facts.hybrid_v2_mount == "/sys/fs/cgroup/unified"
    pure = "\n".join(line for line in HYBRID.splitlines() if "cgroup2" not in line)
    assert facts_from(pure, "", CONTROLLERS).version == "v1"
    assert facts_from("", "", CONTROLLERS) == CgroupFacts()


def test_an_unmounted_place_is_the_last_word() -> None:
    """A mount that lies over a cgroup mount hides it."""
    hidden = HYBRID + "60 31 0:60 / /sys/fs/cgroup/unified rw - tmpfs none rw\n"
    assert facts_from(hidden, "", CONTROLLERS).version == "v1"


def test_a_v2_layout_takes_the_controllers_of_its_root(tmp_path: Path) -> None:
    """Where the caller may write to the v2 root, all its controllers are usable below /ringfence."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids rdma misc\n")
    line = f"41 31 0:38 / {tmp_path} rw,relatime - cgroup2 cgroup2 rw\n"
    facts = facts_from(line, "0::/user.slice/a.scope\n", "")
    assert (facts.version, facts.base, facts.writable, facts.delegated) == ("v2", "/ringfence", True, False)
    assert {"cpu", "cpuset", "io", "memory", "pids"} <= set(facts.controllers)
    assert facts.own == {}
    assert facts.io_throttle


@given(st.text(max_size=300), st.text(max_size=100), st.text(max_size=100))
def test_no_text_of_the_kernel_breaks_the_reader(mountinfo: str, own: str, known: str) -> None:
    """Garbage in /proc is an absence, never an exception."""
    facts_from(f"{mountinfo}\n1 2 3 4 {mountinfo} 6 - cgroup2 x {own}", own, known)
    filesystem_in(mountinfo, "/x")
    id_ranges(mountinfo, "me", 1)
    swap_total(mountinfo)
    meminfo(mountinfo, "MemTotal")
    cpus_of(mountinfo)
    described("/x", mountinfo)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("0-3", {0, 1, 2, 3}),
        ("0", {0}),
        ("0-1,4,6-7", {0, 1, 4, 6, 7}),
        ("", set()),
        ("3-1", set()),
        ("0-99999999", set()),
        ("a", set()),
        ("-1", set()),
    ],
)
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    """CPU lists are read as the kernel writes them; what is no list names no CPU."""
    assert cpus_of(text) == cpus


def test_kernel_texts_become_numbers() -> None:
    """Kernel release, memory, swap and id ranges are read from their files' formats."""
    assert kernel_version("6.1.0-13-amd64") == (6, 1)
    assert kernel_version("odd") == (0, 0)
    assert meminfo("MemTotal:       24683656 kB\nMemFree: 1 kB", "MemTotal") == 24683656 * 1024
    heading = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    assert swap_total(heading) == 0
    assert swap_total(f"{heading}/dev/dm-1 partition 1000 0 -2\n/a\\040b file 24 0 -3") == 1024 * 1024
    assert swap_total("") is None
    ranges = "me:100000:65536\nyou:1:2\n1000:5:7\nme:x:1\nme:1\n# no"
    assert id_ranges(ranges, "me", 1000) == (IdRange(100000, 65536), IdRange(5, 7))


def test_who_may_make_user_namespaces() -> None:
    """Each switch that forbids user namespaces is named; root is bound by the number only."""
    assert namespace_permission(100, None, None, root=False) == ""
    assert "max_user_namespaces" in namespace_permission(0, None, None, root=True)
    assert "unprivileged_userns_clone" in namespace_permission(9, 0, None, root=False)
    assert "apparmor" in namespace_permission(9, 1, 1, root=False)
    assert namespace_permission(9, 0, 1, root=True) == ""


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ("crun version 1.8.1\ncommit: f8a0", (1, 8, 1)),
        ("runc version 1.1.5+ds1\nspec: 1.0.2-dev", (1, 1, 5)),
        ("runsc version release-20240729.0\nspec: 1.1.0-rc.1", (20240729, 0, 0)),
        ("runsc version 0.0~20240729.0\nspec: 1.2.0", (20240729, 0, 0)),
        ("runsc version 1.0.2", (1, 0, 2)),
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)", (7, 2, 22)),
        ("Firecracker v1.7.0\n", (1, 7, 0)),
        ("", (0, 0, 0)),
        ("no digits", (0, 0, 0)),
    ],
)
def test_versions_of_runtimes(answer: str, version: tuple[int, int, int]) -> None:
    """What each runtime answers to --version is understood; nonsense is version 0."""
    assert described("/usr/bin/x", answer).version == version


def test_a_program_that_others_can_change_is_not_run(tmp_path: Path) -> None:
    """A runtime that is writable by group or others, or not a file, is not trusted."""
    program = tmp_path / "crun"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert trustworthy(str(program))
    program.chmod(0o775)
    assert not trustworthy(str(program))
    assert not trustworthy(str(tmp_path))
    assert not trustworthy(str(tmp_path / "absent"))


@pytest.mark.parametrize("behaviour", ["exec yes", "sleep 60 & exec sleep 60", "exit 1", "kill -9 $$"])
def test_a_runtime_that_misbehaves_costs_little(
    behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of output, silence, failure or a crash at --version is an unknown version, soon."""
    program = tmp_path / "runsc"
    program.write_text(f"#!/bin/sh\n{behaviour}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("ringfence.host.runtimes._TIMEOUT_S", 0.5)
    started = time.monotonic()
    found = runtimes()["runsc"]
    assert found.path == str(program)
    assert found.version == (0, 0, 0)
    assert time.monotonic() - started < 5


def test_programs_are_found_by_absolute_path_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory on PATH is passed over, since a job may have written there."""
    program = tmp_path / "runsc"
    program.write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f".::{tmp_path}")
    assert find("runsc") != str(program)
    program.chmod(0o755)
    assert find("runsc") == str(program)
    monkeypatch.setenv("PATH", ".:")
    assert find("runsc") != "./runsc"


def test_the_file_system_of_a_path_is_the_longest_mount() -> None:
    """The deepest mount point that holds a path wins, and of two on one place the later."""
    text = (
        "1 0 254:0 / / rw - ext4 /dev/vda rw\n"
        "2 1 0:5 / /var rw - tmpfs a rw\n"
        "3 1 0:6 / /var rw - xfs /dev/b rw\n"
        "4 1 0:7 / /variant rw - btrfs c rw\n"
    )
    assert filesystem_in(text, "/var/lib").kind == "xfs"
    assert filesystem_in(text, "/variants").kind == "ext4"
    assert filesystem_in(text, "/variant").kind == "btrfs"
    assert filesystem_in("", "/var").kind == ""
    assert block_device(filesystem_in(text, "/var/lib")) is None


def test_idmapped_mounts_need_a_kernel_and_a_file_system() -> None:
    """Mapped mounts came file system by file system."""
    assert idmapped((5, 12), "ext4")
    assert not idmapped((5, 11), "ext4")
    assert not idmapped((6, 2), "tmpfs")
    assert not idmapped((6, 9), "nfs")
