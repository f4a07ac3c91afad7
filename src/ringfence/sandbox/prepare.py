"""From what the user asked for to a plan: found in the cache, or made. On the way of every run.

A cached plan is only ever a shortcut: its key covers everything that the plan was made from, and the path without
the cache defines the behaviour. RINGFENCE_PLAN_CACHE=off takes that path.
"""

from __future__ import annotations

import marshal
import os
import sys

from ringfence.host.cache import host_key
from ringfence.image.find import find
from ringfence.linux.paths import run_dir, state_dir
from ringfence.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ringfence.image.model import Image
    from ringfence.plan.document import Plan
    from ringfence.plan.workload import HostFiles
    from ringfence.policy.model import Policy

_MOST_PLANS = 512
_MOST_BYTES = 4 << 20
_CHECKSUM_BYTES = 16
_ROOMS = ("cgroup", "host", "image", "plan", "policy", "policy/presets")


class Request:
    """What to run it under. `policy` is a preset or an absolute path; paths in `overrides` are absolute.

    `overrides` are policy fields by dotted YAML key, `additions` are appended to the policy's own lists and
    `sysctls` to its mapping; `runtime` "" is the first that works here.
    """

    __slots__ = (
        "additions",
        "allow_unenforced",
        "image",
        "overrides",
        "policy",
        "rootfs",
        "runtime",
        "sysctls",
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
    ) -> None:
        """Hold the facts."""
        is_path = "/" in policy or policy.endswith((".yaml", ".yml", ".json"))
        self.policy = os.path.abspath(policy) if is_path else policy
        self.overrides = dict(overrides or {})
        self.additions = dict(additions or {})
        self.sysctls = dict(sysctls or {})
        self.image = image
        self.rootfs = rootfs
        self.runtime = runtime
        self.allow_unenforced = tuple(sorted(set(allow_unenforced)))


def plan_for(request: Request) -> Plan:
    """Return the plan for `request`. Raises PolicyError, ImageError, MountError, HostError."""
    state = state_dir()
    image = find(request.image, request.rootfs, state_dir=state)
    if os.environ.get("RINGFENCE_PLAN_CACHE") == "off":
        return make(request, image)[0]
    home = _cache_dir(state)
    path = f"{home}/{_key(request, image)}"
    plan = _cached(path)
    if plan is None:
        plan, depends = make(request, image)
        _keep(path, plan, depends)
    return plan


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


def make(request: Request, image: Image) -> tuple[Plan, dict[str, str]]:
    """Make the plan, and say which paths it depends on: {path: what `_look` says of it}."""
    from ringfence.errors import PolicyError, UsageError
    from ringfence.host.cache import detect_cached
    from ringfence.host.enforce import FIELDS
    from ringfence.host.sources import resolve_sources
    from ringfence.plan.make import make_plan
    from ringfence.plan.workload import Workload
    from ringfence.policy.load import files_of

    for field in request.allow_unenforced:
        if field not in FIELDS:
            import difflib

            near = difflib.get_close_matches(field, FIELDS, 1)
            raise UsageError(
                f"--allow-unenforced {field!r} is not a policy field",
                hint=f"did you mean {near[0]!r}?" if near else "'ringfence doctor --matrix' lists them",
            )
    policy = policy_for(request)
    depends = list(files_of(request.policy))
    moby = None
    if policy.seccomp not in ("default", "strict"):
        depends.append(policy.seccomp)
        moby = _profile(policy.seccomp)
        if moby is None:
            raise PolicyError(f"cannot read the seccomp profile {policy.seccomp!r}", hint="correct the path")
    sources = resolve_sources(policy, own=(state_dir(), run_dir()))
    depends += [source.given for source in sources]
    workload = Workload(
        image=image.name,
        image_digest=image.digest,
        rootfs=image.rootfs,
        env=image.env,
        host_files=_host_files() if image.kind == "host" else None,
        sources=sources,
        moby=moby,
    )
    plan = make_plan(
        policy,
        workload,
        detect_cached(f"{run_dir()}/host.json"),
        runtime=request.runtime or None,
        allow_unenforced=frozenset(request.allow_unenforced),
    )
    return plan, {path: _look(path) for path in depends}


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
        image.rootfs,
        request.policy,
        request.overrides,
        request.additions,
        request.sysctls,
        request.runtime,
        request.allow_unenforced,
    ]
    return blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


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
    return f"{real} {found.st_dev} {found.st_ino} {found.st_mode} {found.st_size} {found.st_mtime_ns}"


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
    temporary = f"{path}.{os.getpid()}"
    try:
        _make_room(os.path.dirname(path))
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            body = marshal.dumps((depends, {**plan}))
            data = memoryview(_checksum(body) + body)
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        if os.path.lexists(temporary):
            os.unlink(temporary)


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
