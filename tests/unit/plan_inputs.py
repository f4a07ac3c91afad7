"""Hosts, policies and workloads made by hand, of which plans are made in tests."""

import msgspec

from ringfence.host.facts import (
    BlockDevice,
    CgroupFacts,
    GvisorFacts,
    Host,
    IdRange,
    Runtime,
    SubordinateIds,
    UserNamespaces,
    VmmFacts,
)
from ringfence.host.sources import Source
from ringfence.plan.workload import GuestKernel, HostFiles, Workload
from ringfence.policy.load import load, override
from ringfence.policy.model import Policy

V1 = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids")
CRUN = Runtime(path="/usr/bin/crun", version=(1, 8, 1), version_text="crun version 1.8.1")
RUNC = Runtime(path="/usr/sbin/runc", version=(1, 1, 5), version_text="runc version 1.1.5")

ROOT_V1 = Host(
    kernel_release="6.1.0",
    kernel=(6, 1),
    capabilities=("CAP_SYS_ADMIN",),
    cpus="0-3",
    cpu_count=4,
    swap_bytes=0,
    hard_limits={"nofile": 20000, "nproc": 96364, "stack": None, "fsize": None},
    cgroup=CgroupFacts(
        version="v1",
        mounts={name: f"/sys/fs/cgroup/{name}" for name in V1},
        controllers=V1,
        writable=True,
        swap_accounting=True,
        io_throttle=True,
    ),
    userns=UserNamespaces(maximum=1000, allowed=True),
    namespaces=("cgroup", "ipc", "mnt", "net", "pid", "user", "uts"),
    seccomp_filter=True,
    overlayfs=True,
    idmapped_mounts=True,
    state_filesystem="ext4",
    runtimes={"crun": CRUN, "runc": RUNC},
    smt=False,
    ksm=False,
    vulnerabilities={"meltdown": "Not affected"},
    block=BlockDevice(number="254:0", name="vda"),
    state_dir="/var/lib/ringfence",
    run_dir="/run/ringfence",
)
ROOT_V1_RUNC = msgspec.structs.replace(ROOT_V1, runtimes={"runc": RUNC})
RUNSC = Runtime(path="/usr/bin/runsc", version_text="runsc version 0.0~20240729.0")
ROOT_V1_GVISOR = msgspec.structs.replace(
    ROOT_V1,
    runtimes={**ROOT_V1.runtimes, "runsc": RUNSC},
    gvisor=GvisorFacts(
        platforms=("systrap",), reasons={"kvm": "/dev/kvm is not there", "ptrace": "not needed"}, missing=()
    ),
)
_QEMU = "/usr/bin/qemu-system-x86_64"
ROOT_V1_QEMU = msgspec.structs.replace(
    ROOT_V1,
    runtimes={
        **ROOT_V1.runtimes,
        "qemu-system-x86_64": Runtime(
            path=_QEMU, version=(7, 2, 22), version_text="QEMU emulator version 7.2.22"
        ),
    },
    vmm=VmmFacts(
        files={
            _QEMU: _QEMU,
            "/lib/x86_64-linux-gnu/libc.so.6": "/usr/lib/x86_64-linux-gnu/libc.so.6",
            "/usr/share/qemu/bios-microvm.bin": "/usr/share/seabios/bios-microvm.bin",
        }
    ),
    kvm="works",
)
ROOT_V1_EMULATED = msgspec.structs.replace(
    ROOT_V1_QEMU, kvm="unusable", kvm_reason="internal error (emulation failed)"
)
HYBRID = msgspec.structs.replace(
    ROOT_V1,
    cgroup=msgspec.structs.replace(
        ROOT_V1.cgroup,
        version="hybrid",
        unified="/sys/fs/cgroup/unified",
        hybrid_v2_mount="/sys/fs/cgroup/unified",
    ),
)
_V2 = CgroupFacts(
    version="v2",
    unified="/sys/fs/cgroup",
    controllers=("cpu", "cpuset", "io", "memory", "pids"),
    writable=True,
    swap_accounting=True,
    io_throttle=True,
)
ROOT_V2 = msgspec.structs.replace(ROOT_V1, cgroup=_V2)
_IDS = SubordinateIds(
    uids=(IdRange(100000, 65536),),
    gids=(IdRange(100000, 65536),),
    newuidmap="/usr/bin/newuidmap",
    newgidmap="/usr/bin/newgidmap",
)
_USER_GROUP = "/user.slice/user-1000.slice/run.scope"
USER_V2 = msgspec.structs.replace(
    ROOT_V2,
    euid=1000,
    capabilities=(),
    idmapped_mounts=False,
    cgroup=msgspec.structs.replace(
        _V2, base=f"{_USER_GROUP}/ringfence", own={"": _USER_GROUP}, delegated=True
    ),
    ids=_IDS,
    state_dir="/home/user/.local/share/ringfence",
    run_dir="/run/user/1000/ringfence",
)
USER_V2_GVISOR = msgspec.structs.replace(
    USER_V2, runtimes=ROOT_V1_GVISOR.runtimes, gvisor=ROOT_V1_GVISOR.gvisor
)
USER_V1 = msgspec.structs.replace(
    USER_V2,
    cgroup=msgspec.structs.replace(ROOT_V1.cgroup, controllers=(), writable=False, swap_accounting=False),
)
USER_HYBRID = msgspec.structs.replace(
    USER_V1,
    cgroup=msgspec.structs.replace(HYBRID.cgroup, controllers=(), writable=False, swap_accounting=False),
)
# What nothing enforces for a user without a cgroup of his own.
CGROUP_FIELDS = frozenset(
    {
        "limits.memory",
        "limits.cpus",
        "limits.cpu_weight",
        "limits.pids",
        "limits.io.read",
        "limits.io.read_iops",
    }
)

BASE = Workload(
    image="base",
    image_digest="sha256:" + "b" * 64,
    layers=("/var/lib/ringfence/images/base/rootfs",),
    disks=("254:0",),
    env=("PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"),
)
# The image as a disk, and a kernel for it: as a microVM's plan is made from.
MACHINE = msgspec.structs.replace(
    BASE,
    disk="/var/lib/ringfence/images/disks/base.erofs",
    kernel=GuestKernel(
        name="own-6.1.0-ringfence-0123456789ab",
        path="/var/lib/ringfence/kernels/own-6.1.0-ringfence-0123456789ab/vmlinux",
        digest="sha256:" + "e" * 64,
        release="6.1.0-ringfence",
        acpi=False,
        cmdline="lpj=100000",
    ),
)
HOST_VIEW = Workload(
    image="host",
    image_digest="sha256:" + "c" * 64,
    layers=(),
    disks=("254:0",),
    env=("PATH=/usr/bin:/bin",),
    host_files=HostFiles(
        binds=("/usr",),
        symlinks=(("/bin", "usr/bin"), ("/lib", "usr/lib")),
        files=(("/etc/ld.so.cache", "/etc/ld.so.cache"),),
    ),
)


def policy(preset: str = "untrusted", **overrides: object) -> Policy:
    """Return a preset with fields replaced; "__" in a name stands for a dot."""
    found = load(preset)
    return override(found, {key.replace("__", "."): value for key, value in overrides.items()})


MOUNTS = (
    {"source": "/srv/data", "target": "/data"},
    {"source": "/srv/file", "target": "/work/conf/file"},
    {"source": "/srv/out", "target": "/tmp/out", "mode": "rw"},
)
SOURCES = (
    Source("/srv/data", "/srv/data", "/data", "directory", True),
    Source("/srv/file", "/srv/file", "/work/conf/file", "file", True),
    Source("/srv/out", "/srv/out", "/tmp/out", "directory", False),
    Source("/dev/fuse", "/dev/fuse", "/dev/fuse", "device", False, "c 10:229 rw"),
)
WITH_MOUNTS = msgspec.structs.replace(BASE, sources=SOURCES)
