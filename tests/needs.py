"""What a test may need of this machine, each with a probe that says why it is missing, "" when it is there.

`@pytest.mark.requires("root", "crun")` skips with that reason; with RINGFENCE_STRICT set it fails instead.
"""

import functools
import os
import platform
import shutil
from collections.abc import Callable

import msgspec

from ringfence.errors import HostError
from ringfence.host import places, sentry
from ringfence.host.cgroups import cgroup_facts
from ringfence.host.detect import detect
from ringfence.host.gvisor import gvisor_facts
from ringfence.image import store
from ringfence.linux.paths import state_dir
from ringfence.runtime.microvm.kernel import kernel_name

COMPILERS = ("musl-gcc", "gcc")


def _root() -> str:
    return "" if os.geteuid() == 0 else "not run as root"


def _runtime(name: str) -> Callable[[], str]:
    return lambda: "" if places.find(name) else f"{name} is not installed"


def _program(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"{name} is not installed"


@functools.cache
def _runsc() -> str:
    host = detect()
    lacking = sentry.lack(msgspec.structs.replace(host, gvisor=gvisor_facts(host)))
    return lacking.reason if lacking else ""


def _userns() -> str:
    try:
        with open("/proc/sys/user/max_user_namespaces") as file:
            return "" if int(file.read()) > 0 else "user.max_user_namespaces is 0"
    except OSError:
        return "the kernel has no user namespaces"


def _controller(name: str) -> Callable[[], str]:
    def probe() -> str:
        facts = cgroup_facts()
        if facts.version not in ("v1", "hybrid"):
            return f"cgroup {facts.version} here"
        return "" if name in facts.mounts else f"no cgroup v1 hierarchy has {name}"

    return probe


def _group(name: str) -> Callable[[], str]:
    """A controller by its name in cgroup v2, in whichever layout this host has."""

    def probe() -> str:
        facts = cgroup_facts()
        if facts.version == "v2":
            there = name == "devices" or name in facts.controllers  # a BPF program, not a controller, in v2
        else:
            there = {"io": "blkio"}.get(name, name) in facts.mounts
        return "" if there else f"no controller {name} in cgroup {facts.version}"

    return probe


def _unified() -> str:
    version = cgroup_facts().version
    return "" if version == "v2" else f"cgroup {version} here; make test-cgroup2 has a machine with v2"


def _compiler() -> str:
    return "" if any(shutil.which(name) for name in COMPILERS) else "no C compiler"


def _base() -> str:
    return "" if store.resolve(state_dir(), "base:latest") else "the image base is not built: make setup"


def _kernel() -> str:
    try:
        kernel_name(state_dir())
    except HostError as error:
        return str(error)
    return ""


@functools.cache
def _firecracker() -> str:
    host = detect()
    if "firecracker" not in host.runtimes:
        return "Firecracker is not installed"
    return "" if host.kvm == "works" else f"KVM does not work here: {host.kvm_reason or host.kvm}"


def _two_cpus() -> str:
    return "" if (os.cpu_count() or 1) > 1 else "only one CPU"


PROBES: dict[str, Callable[[], str]] = {
    "root": _root,
    "crun": _runtime("crun"),
    "runc": _runtime("runc"),
    "runsc": _runsc,
    "skopeo": _program("skopeo"),
    "umoci": _program("umoci"),
    "docker-registry": _program("docker-registry"),
    "htpasswd": _program("htpasswd"),
    "gpg": _program("gpg"),
    "openssl": _program("openssl"),
    "buildah": _program("buildah"),
    "mkfs.erofs": _program("mkfs.erofs"),
    "mmdebstrap": _program("mmdebstrap"),
    "podman": _program("podman"),
    "zstd": _program("zstd"),
    "lz4": _program("lz4"),
    "qemu": _program("qemu-system-x86_64"),
    "kernel": _kernel,
    "firecracker": _firecracker,
    "kvm:device": lambda: "" if os.path.exists("/dev/kvm") else "no /dev/kvm",
    "userns": _userns,
    "compiler": _compiler,
    "image:base": _base,
    "two-cpus": _two_cpus,
    "x86_64": lambda: "" if platform.machine() == "x86_64" else f"this is {platform.machine()}",
    "cgroup2": _unified,
    **{f"cgroup:{name}": _group(name) for name in ("memory", "pids", "cpu", "cpuset", "io", "devices")},
    **{
        f"cgroup1:{name}": _controller(name)
        for name in ("memory", "pids", "cpu", "cpuset", "blkio", "devices")
    },
}
