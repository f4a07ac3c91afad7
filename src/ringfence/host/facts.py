"""What this host is: plain facts, read once, that every decision about enforcement is made from.

A `Host` is a value: it can be written by hand in a test, survives JSON, and two equal hosts have one digest.
Reading the facts lives in `ringfence.host.detect`, keeping them between runs in `ringfence.host.cache`.
An absent fact is empty, zero or None; it never means "fine".
"""

from typing import Literal

import msgspec

CgroupVersion = Literal["v1", "v2", "hybrid", "none"]
Kvm = Literal["absent", "not openable", "works", "unusable"]
# How long runsc may take to run a program that does nothing: on kvm, which can hang, and on the others, which can
# only be slow on a busy machine.
TRIAL_S = 1.0
SLOW_TRIAL_S = 3.0


class CgroupFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How control groups are laid out here; `ringfence.cgroup.layout.Layout` takes the same names.

    `mounts` maps a v1 controller (and "name=systemd") to its mount point; `unified` is the v2 mount point
    or "". `controllers` are those usable for sandboxes. `base` is the group under which all sandboxes live,
    a path inside each hierarchy: "/ringfence", or one in the caller's `delegated` subtree.
    `own` maps each controller ("" for v2) to the caller's own group; recorded for a rootless caller only.
    `hybrid_v2_mount` is a v2 mount beside v1 ones; crun refuses to run where it sees one.
    """

    version: CgroupVersion = "none"
    mounts: dict[str, str] = {}
    unified: str = ""
    controllers: tuple[str, ...] = ()
    base: str = "/ringfence"
    own: dict[str, str] = {}
    writable: bool = False
    delegated: bool = False
    hybrid_v2_mount: str = ""
    hybrid_v2_controllers: tuple[str, ...] = ()
    swap_accounting: bool = False
    io_throttle: bool = False


class UserNamespaces(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether this caller may make user namespaces, and if not why; None: no such switch in this kernel."""

    maximum: int = 0
    unprivileged_clone: int | None = None
    apparmor_restricted: int | None = None
    allowed: bool = False
    reason: str = ""


class IdRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`count` host ids from `start`, as in subuid(5)."""

    start: int
    count: int


class SubordinateIds(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Id ranges that the current user may map; the helpers are paths, "" when missing or not privileged."""

    uids: tuple[IdRange, ...] = ()
    gids: tuple[IdRange, ...] = ()
    newuidmap: str = ""
    newgidmap: str = ""


class Lsm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Security modules; `active` is /sys/kernel/security/lsm, empty when securityfs is not mounted."""

    active: tuple[str, ...] = ()
    apparmor: bool = False
    apparmor_profile: bool = False
    selinux: bool = False


class Runtime(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A program that can run a tier; `version` is (0, 0, 0) when its answer was not understood."""

    path: str
    version: tuple[int, int, int] = (0, 0, 0)
    version_text: str = ""


class GvisorFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the runsc of this host can do; from a trial, see `ringfence.host.gvisor`.

    `platforms` are those that ran a program here, best first; `reasons` say why each other one did not.
    `missing` are the command-line flags that Ringfence needs and this runsc does not have ("--pass-fd").
    """

    platforms: tuple[str, ...] = ()
    reasons: dict[str, str] = {}
    missing: tuple[str, ...] = ()


class VmmFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The files that a VMM consists of here: where each is looked for, its program first, and where it really is.

    `reason` says why it cannot be used, "" if it can.
    """

    files: dict[str, str] = {}
    reason: str = ""


class BlockDevice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole disk under the state directory, "major:minor" as the cgroup files want it."""

    number: str
    name: str = ""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Facts of one host as one caller (user, capabilities, limits) sees it.

    `cpus` is a list such as "0-3"; `swap_bytes` is the size of all swap areas, None when unknown;
    `hard_limits` maps "nofile" and the like to the ceiling of this process, None when unlimited; `smt` and
    `ksm` say whether they are active; `vulnerabilities` are the kernel's own words on each CPU flaw;
    `sysctls` are those that `doctor` judges; `block` is the disk below `state_dir`. `kvm` is by trial, and
    `kvm_reason` says why it does not work; `gvisor` is None until `ringfence.host.gvisor` was asked.
    """

    kernel_release: str = ""
    kernel: tuple[int, int] = (0, 0)
    arch: str = "x86_64"
    euid: int = 0
    initial_userns: bool = True
    capabilities: tuple[str, ...] = ()
    cpus: str = "0"
    cpu_count: int = 1
    memory_bytes: int = 0
    swap_bytes: int | None = None
    page_bytes: int = 4096
    hard_limits: dict[str, int | None] = {}
    cgroup: CgroupFacts = CgroupFacts()
    userns: UserNamespaces = UserNamespaces()
    ids: SubordinateIds = SubordinateIds()
    namespaces: tuple[str, ...] = ()
    seccomp_filter: bool = False
    seccomp_actions: tuple[str, ...] = ()
    lsm: Lsm = Lsm()
    overlayfs: bool = False
    idmapped_mounts: bool = False
    state_filesystem: str = ""
    kvm: Kvm = "absent"
    kvm_reason: str = ""
    gvisor: GvisorFacts | None = None
    vmm: VmmFacts | None = None
    runtimes: dict[str, Runtime] = {}
    smt: bool | None = None
    ksm: bool | None = None
    vulnerabilities: dict[str, str] = {}
    pid_max: int = 0
    threads_max: int = 0
    sysctls: dict[str, str] = {}
    block: BlockDevice | None = None
    boot_id: str = ""
    state_dir: str = ""
    run_dir: str = ""

    @property
    def rootless(self) -> bool:
        """Whether the caller is not the host's real root; then most facts are those of an ordinary user."""
        return self.euid != 0 or not self.initial_userns or not self.has("CAP_SYS_ADMIN")

    def has(self, capability: str) -> bool:
        """Whether this process has `capability` ("CAP_SYS_RESOURCE") in its effective set."""
        return capability in self.capabilities

    def settable(self, rlimit: str, value: int) -> bool:
        """Whether a child can be given hard limit `value` for `rlimit` ("nofile"); see setrlimit(2)."""
        ceiling = self.hard_limits.get(rlimit, 0)
        return ceiling is None or value <= ceiling or self.has("CAP_SYS_RESOURCE")


def host_digest(host: Host) -> str:
    """Return "sha256:..." of the canonical JSON of `host`; part of the identity of a plan."""
    import hashlib

    return "sha256:" + hashlib.sha256(msgspec.json.encode(host, order="deterministic")).hexdigest()
