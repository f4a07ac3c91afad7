"""From what the user asked for to a plan: found in the cache, or made. On the way of every run.

A cached plan is only ever a shortcut: its key covers everything that the plan was made from, and the path without
the cache defines the behaviour. RINGFENCE_PLAN_CACHE=off takes that path.
"""

from __future__ import annotations

import marshal
import os
import sys

from ringfence.errors import HostError, ImageError
from ringfence.host.cache import host_key
from ringfence.image.find import ImageMissing, find
from ringfence.linux.paths import run_dir, state_dir
from ringfence.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from ringfence.image.model import Image
    from ringfence.plan.document import Plan
    from ringfence.plan.workload import GuestKernel, HostFiles, Start
    from ringfence.policy.model import Policy

    class Teller(Protocol):
        """Tells a person how fetching an image goes."""

        def say(self, step: str) -> None:
            """Tell one step."""

        def progress(self, done_bytes: int, all_bytes: int) -> None:
            """Tell how far it is."""

        def close(self) -> None:
            """Tidy the line up."""


_MOST_PLANS = 512
_MOST_BYTES = 4 << 20
_CHECKSUM_BYTES = 16
# Fields, beside the limits, whose values are never paths.
_NO_PATHS = frozenset(
    ("isolation", "user", "network.mode", "filesystem.root", "filesystem.tmp", "no_new_privileges", "lsm")
)
_ROOMS = ("cgroup", "host", "image", "linux", "plan", "policy", "policy/presets")


class Silent:
    """A teller that tells nothing."""

    def say(self, step: str) -> None:
        """Do nothing."""

    def progress(self, done_bytes: int, all_bytes: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Request:
    """What to run it under. `policy` is a preset or an absolute path; paths in `overrides` are absolute.

    `overrides` are policy fields by dotted YAML key, `additions` are appended to the policy's own lists and
    `sysctls` to its mapping; `runtime` "" is the first that works here. `pull` is "missing", "always" or "never",
    `platform` "" is this host's; `gvisor_platform` "" is the best that works here, `vmm` "" is QEMU. `teller` is told
    how fetching goes.
    """

    __slots__ = (
        "additions",
        "allow_emulation",
        "allow_unenforced",
        "gvisor_platform",
        "image",
        "overrides",
        "platform",
        "policy",
        "pull",
        "rootfs",
        "runtime",
        "sysctls",
        "teller",
        "vmm",
    )

    def __init__(
        self,
        *,
        policy: str = "untrusted",
        overrides: Mapping[str, object] | None = None,
        additions: Mapping[str, list[object]] | None = None,
        sysctls: Mapping[str, str] | None = None,
        image: str | None = None,
        rootfs: str | None = None,
        runtime: str = "",
        allow_unenforced: tuple[str, ...] = (),
        pull: str = "missing",
        platform: str = "",
        gvisor_platform: str = "",
        allow_emulation: bool = False,
        vmm: str = "",
        teller: Callable[[], Teller] | None = None,
    ) -> None:
        """Hold the facts; `teller` makes one when it is needed."""
        is_path = "/" in policy or policy.endswith((".yaml", ".yml", ".json"))
        self.policy = os.path.abspath(policy) if is_path else policy
        self.overrides = dict(overrides or {})
        self.additions = dict(additions or {})
        self.sysctls = dict(sysctls or {})
        self.image = image
        self.rootfs = rootfs
        self.runtime = runtime
        self.allow_unenforced = tuple(sorted(set(allow_unenforced)))
        self.pull = pull
        self.platform = platform
        self.gvisor_platform = gvisor_platform
        self.allow_emulation = allow_emulation
        self.vmm = vmm
        self.teller = teller


def plan_for(request: Request) -> Plan:
    """Return the plan for `request`, whose image is fetched first if need be.

    Raises PolicyError, ImageError, MountError, HostError.
    """
    state = state_dir()
    image = _image(request, state)
    if os.environ.get("RINGFENCE_PLAN_CACHE") == "off":
        return make(request, image)[0]
    home = _cache_dir(state)
    path = f"{home}/{_key(request, image)}"
    plan = _cached(path)
    if plan is None:
        plan, depends, image = make(request, image)
        if not _of_a_moment(plan, request):
            _keep(f"{home}/{_key(request, image)}", plan, depends)
    return plan


def _of_a_moment(plan: Plan, request: Request) -> bool:
    """Say whether a plan has gVisor's second choice of a platform, which may have been for the load of a moment."""
    guest = plan["guest"]
    return guest is not None and guest["platform"] == "ptrace" and not request.gvisor_platform


def _image(request: Request, state: str) -> Image:
    """Find the image, or have it fetched: `always` asks its registry in any case."""
    if request.pull != "always" or request.rootfs is not None or request.image in (None, "host"):
        try:
            return find(request.image, request.rootfs, state_dir=state)
        except ImageMissing:
            if request.pull == "never":
                raise
    from ringfence.image.pull import ensure
    from ringfence.image.reference import parse

    # The policy's rules come before the first byte is fetched.
    rules = policy_for(request).image
    reference = parse(str(request.image))
    if reference.transport != "dir":
        teller = Silent() if request.teller is None else request.teller()
        try:
            ensure(
                state,
                reference,
                how=request.pull,
                rules_of=rules,
                platform=request.platform,
                say=teller.say,
                progress=teller.progress,
            )
        finally:
            teller.close()
    return find(request.image, None, state_dir=state)


def policy_for(request: Request) -> Policy:
    """Return the resolved policy of `request`. Raises PolicyError."""
    from ringfence.policy.load import load, override

    policy = load(request.policy)
    fields = dict(request.overrides)
    if request.additions or request.sysctls:
        from ringfence.policy.dump import plain_value

        for key, more in request.additions.items():
            have = fields.get(key, plain_value(policy, key))
            fields[key] = [*(have if isinstance(have, list) else ()), *more]
        if request.sysctls:
            fields["sysctls"] = policy.sysctls | request.sysctls
    return override(policy, fields) if fields else policy


def make(request: Request, image: Image) -> tuple[Plan, dict[str, str], Image]:
    """Make the plan, and say which paths it depends on, {path: what `_look` said of it}, and which image it is of.

    That may be another one than `image`, of the same name: one that was fetched because the policy wanted it so.
    """
    from ringfence.errors import PolicyError, UsageError
    from ringfence.host.cache import detect_cached
    from ringfence.host.enforce import FIELDS
    from ringfence.host.sources import resolve_sources
    from ringfence.host.storage import disks_below
    from ringfence.plan.make import choose_tier, make_plan
    from ringfence.plan.workload import Workload
    from ringfence.policy.load import files_of
    from ringfence.policy.paths import RUNTIME_SOCKETS

    for field in request.allow_unenforced:
        if field not in FIELDS:
            import difflib

            near = difflib.get_close_matches(field, FIELDS, 1)
            raise UsageError(
                f"--allow-unenforced {field!r} is not a policy field",
                hint=f"did you mean {near[0]!r}?" if near else "'ringfence doctor --matrix' lists them",
            )
    # Each is looked at before it is read: what changes in between makes the kept plan useless and not wrong.
    depends = {path: _look(path) for path in files_of(request.policy)}
    policy = policy_for(request)
    tier = choose_tier(policy)
    moby = None
    if policy.seccomp not in ("default", "strict"):
        depends[policy.seccomp] = _look(policy.seccomp)
        moby = _profile(policy.seccomp)
        if moby is None:
            raise PolicyError(f"cannot read the seccomp profile {policy.seccomp!r}", hint="correct the path")
    if policy.image.signatures is not None:
        from ringfence.image.rules import files

        depends |= {path: _look(path) for path in files(policy.image.signatures)}
    given = [mount.source for mount in policy.filesystem.mounts]
    given += [device.partition(":")[0] for device in policy.devices]
    # A directory in which such a socket turns up is one that a policy may not show any more.
    given += [f"{mount.source}/{name}" for mount in policy.filesystem.mounts for name in RUNTIME_SOCKETS]
    depends |= {path: _look(path) for path in given}
    sources = resolve_sources(policy, own=(state_dir(), run_dir()))
    image = _allowed(request, image, policy)
    layers, env, start = _contents(image, policy)
    disks, unknown = disks_below(
        [*(layers or ("/usr",)), *(source.source for source in sources if source.kind != "device")]
    )
    workload = Workload(
        image=image.name,
        image_digest=image.digest,
        image_record=image.path if image.kind == "store" else "",
        layers=layers,
        env=env,
        start=start,
        host_files=_host_files() if image.kind == "host" else None,
        sources=sources,
        disks=disks,
        unknown_disks=unknown,
        moby=moby,
        noticed=_noticed(layers) if tier == "gvisor" else frozenset(),
        kernel=_kernel(request.vmm) if tier == "microvm" else None,
        disk=_disk(request, image) if tier == "microvm" else "",
    )
    host = detect_cached(f"{run_dir()}/host.json")
    if tier == "gvisor":
        from ringfence.host.gvisor import with_gvisor

        host = with_gvisor(host, f"{run_dir()}/gvisor.json", request.gvisor_platform)
    if tier == "microvm":
        from ringfence.host.vmm import with_vmm

        host = with_vmm(host, f"{run_dir()}/vmm{request.vmm}.json", request.vmm)
    plan = make_plan(
        policy,
        workload,
        host,
        runtime=request.runtime or None,
        platform=request.gvisor_platform,
        emulation=request.allow_emulation,
        vmm=request.vmm,
        allow_unenforced=frozenset(request.allow_unenforced),
    )
    return plan, depends, image


def _allowed(request: Request, image: Image, policy: Policy) -> Image:
    """Return the image that the policy's rules and the platform let in: `image`, or one fetched in its place."""
    from ringfence.image import rules

    if image.kind != "store":
        rules.check(policy.image, None, shown=image.name, local=True)
        return image
    from ringfence.image.pull import ensure
    from ringfence.image.reference import parse

    while True:
        how = "missing" if request.pull != "never" and image.state == state_dir() else "never"
        ensure(
            image.state,
            parse(request.image or "base"),
            how=how,
            rules_of=policy.image,
            platform=request.platform,
        )
        # What was checked is whatever has the name: if that is another image now, `image` was not.
        found = find(request.image, None, state_dir=state_dir())
        if (found.digest, found.state) == (image.digest, image.state):
            return found
        image = found


def _contents(image: Image, policy: Policy) -> tuple[tuple[str, ...], tuple[str, ...], Start]:
    """Return the root directories of the image's layers, the environment it gives, and how it wants to start."""
    from ringfence.image.model import ENV
    from ringfence.plan.workload import Start

    if image.kind != "store":
        return ((image.path,) if image.kind == "rootfs" else (), ENV, Start())
    from ringfence.image.accounts import image_user
    from ringfence.image.store import layer_path, read_record

    record = read_record(image.state, image.digest)
    if len(record.layers) > 1 and os.geteuid() != 0 and image.state != state_dir():
        raise ImageError(
            f"the layers of root's image {image.name!r} cannot be put together by a user",
            hint="pull or import it yourself",
        )
    layers = tuple(f"{layer_path(image.state, layer.diff_id)}/fs" for layer in record.layers)
    wish = record.config
    start = Start(
        entrypoint=wish.entrypoint,
        command=wish.cmd,
        cwd=os.path.normpath(wish.cwd) if wish.cwd.startswith("/") and wish.cwd.strip("/") else "",
        user=image_user(layers, wish.user) if policy.user == "dedicated" else None,
        volumes=wish.volumes,
        stop_signal=_signal(wish.stop_signal),
    )
    return layers, (*ENV, *wish.env), start


def _kernel_name(request: Request) -> str:
    """Return the name of the kernel that a microVM would boot, "" where none can be asked for."""
    if request.overrides.get("isolation") in ("linux", "gvisor"):
        return ""
    from ringfence.runtime.microvm.kernel import kernel_name

    try:
        return kernel_name(state_dir())
    except HostError:
        return ""


def _kernel(vmm: str) -> GuestKernel:
    """Return the kernel that is chosen for microVMs of `vmm`. Raises HostError when there is none."""
    from ringfence.plan.workload import GuestKernel
    from ringfence.runtime.microvm.kernel import find_kernel

    kernel = find_kernel(state_dir())
    return GuestKernel(
        name=kernel.name,
        path=kernel.path,
        digest=kernel.digest,
        release=kernel.release,
        acpi=kernel.acpi,
        cmdline=kernel.cmdline,
        modules=(*kernel.modules, *(kernel.vsock_modules if vmm == "firecracker" else ())),
    )


def _disk(request: Request, image: Image) -> str:
    """Return the disk image of an image of the store, made now if need be; "" for a directory, copied at each start."""
    if image.kind != "store":
        return ""
    from ringfence.image.disks import disk

    teller = Silent() if request.teller is None else request.teller()
    try:
        return disk(image.state, image.digest, say=teller.say)
    finally:
        teller.close()


def _noticed(layers: tuple[str, ...]) -> frozenset[str]:
    """Return which of the paths that gVisor's tier warns about are in the image."""
    from ringfence.plan.gvisor_compat import PROGRAMS

    return frozenset(
        path for path, _, _ in PROGRAMS if any(os.path.lexists(f"{layer}/{path}") for layer in layers)
    )


def _signal(name: str) -> int:
    """Return the number of "SIGQUIT", "QUIT" or "3"; SIGTERM for what is none."""
    import signal

    if name.isdigit() and 0 < int(name) < signal.NSIG:
        return int(name)
    number = getattr(signal, name if name.startswith("SIG") else f"SIG{name}", None)
    return int(number) if isinstance(number, signal.Signals) else int(signal.SIGTERM)


def _host_files() -> HostFiles:
    from ringfence.image.host import host_view
    from ringfence.plan.workload import HostFiles

    view = host_view()
    generated = (
        "/etc/passwd",
        "/etc/group",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
        "/etc/nsswitch.conf",
    )
    return HostFiles(
        binds=view.binds,
        symlinks=view.symlinks,
        files=tuple((path, os.path.realpath(path)) for path, _ in view.files if path not in generated),
    )


def _profile(path: str) -> bytes | None:
    """Read a seccomp profile of at most 1 MiB; the reader of profiles judges what is in it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, (1 << 20) + 1)
    except OSError:
        return None
    finally:
        os.close(fd)


def _key(request: Request, image: Image) -> str:
    from _blake2 import blake2b  # hashlib would load OpenSSL: 5 ms of every run

    parts = [
        VERSION,
        marshal.version,
        sys.hexversion,
        _code(),
        host_key(),
        image.name,
        image.digest,
        image.path,
        request.image,
        request.platform,
        request.gvisor_platform,
        request.allow_emulation,
        request.vmm,
        _kernel_name(request),
        request.policy,
        request.overrides,
        request.additions,
        request.sysctls,
        request.runtime,
        request.allow_unenforced,
        os.getcwd() if _names_paths(request) else "",
    ]
    return blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


def _names_paths(request: Request) -> bool:
    """Say whether a field that was given may hold a path, which starts at the working directory if it is relative."""
    mounts = request.additions.get("filesystem.mounts", ())
    return any(
        not key.startswith("limits.") and key not in _NO_PATHS for key in request.overrides
    ) or not all(isinstance(mount, dict) and str(mount.get("source")).startswith("/") for mount in mounts)


def _code() -> str:
    """Say which files of ours plans are made by, so that a changed one makes new plans."""
    root = os.path.dirname(os.path.dirname(__file__))
    newest, count = 0, 0
    for room in _ROOMS:
        with os.scandir(f"{root}/{room}") as found:
            for item in found:
                newest = max(newest, item.stat().st_mtime_ns)
                count += 1
    return f"{root} {newest} {count}"


def _look(path: str) -> str:
    """Say where `path` really leads and what is there, so that a change of either shows."""
    real = os.path.realpath(path)
    try:
        found = os.lstat(real)
    except OSError:
        return f"{real} missing"
    if os.path.isdir(real):  # a mounted directory may change its content, but not become another one
        return f"{real} {found.st_dev} {found.st_ino} {found.st_uid} {found.st_gid}"
    times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{real} {found.st_dev} {found.st_ino} {found.st_mode} {found.st_size} {times}"


def _cached(path: str) -> Plan | None:
    """Return the plan kept at `path`, None unless it is a whole file of this user's own, and still true."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077 or found.st_size > _MOST_BYTES:
            return None
        data = os.read(fd, found.st_size)
    except OSError:
        return None
    finally:
        os.close(fd)
    checksum, body = data[:_CHECKSUM_BYTES], data[_CHECKSUM_BYTES:]
    if checksum != _checksum(body):
        return None
    # Our own file and undamaged, so marshal may read it: it needs no import, where json would cost 7 ms.
    depends, plan = marshal.loads(body)  # noqa: S302
    if any(_look(name) != value for name, value in depends.items()):
        return None
    kept: Plan = plan
    return kept


def _keep(path: str, plan: Plan, depends: dict[str, str]) -> None:
    """Keep a plan; a full or read-only disk is no reason not to run."""
    # A name of this very call: several threads of a process may keep the same plan at once.
    temporary = f"{path}.{os.urandom(8).hex()}"
    try:
        _make_room(os.path.dirname(path))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    try:
        try:
            body = marshal.dumps((depends, {**plan}))
            data = memoryview(_checksum(body) + body)
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        try:
            os.unlink(temporary)
        except OSError:  # somebody has made room
            return


def _checksum(body: bytes) -> bytes:
    from _blake2 import blake2b

    return blake2b(body, digest_size=_CHECKSUM_BYTES).digest()


def _make_room(home: str) -> None:
    names = os.listdir(home)
    if len(names) > _MOST_PLANS:
        for name in names:
            os.unlink(f"{home}/{name}")


def _cache_dir(state: str) -> str:
    path = f"{state}/plans"
    try:
        os.mkdir(path, 0o700)
    except OSError:
        pass
    return path
