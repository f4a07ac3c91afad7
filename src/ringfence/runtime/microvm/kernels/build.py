"""A guest kernel compiled from Debian's kernel source: small, without modules, and hardened by our fragment.

Kernels of the same source, options and compiler are the same file, so one that is there is not built again.
"""

import hashlib
import os
import re
import shutil
import time

from ringfence.errors import HostError
from ringfence.runtime.microvm.kernel import kernels_dir
from ringfence.runtime.microvm.kernels import debian, elf, fragment, store
from ringfence.runtime.microvm.kernels.commands import CommandFailed, need, run
from ringfence.runtime.microvm.kernels.fetch import check_machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

    from ringfence.runtime.microvm.kernels.store import Kernel

FRAGMENT = os.path.join(os.path.dirname(os.path.dirname(__file__)), "kernel.config")
LOG = "build.log"  # beside the kernels, of the last build that failed
_META, _PREFIX = "linux-source", "linux-source-"
_TARBALL = re.compile(r"linux-source-(\d+)\.(\d+)\.tar\.(xz|zst|gz)")
_SOURCES = "/usr/src"
# The tree takes 1.2 GB, what is compiled 0.1 GB more.
_ROOM_BYTES = 1_500_000_000
_DOWNLOADED_BYTES = 300_000_000
_UNPACK_S, _CONFIGURE_S, _BUILD_S = 900.0, 600.0, 4 * 3600.0
_PROGRAMS = ("make", "gcc", "ld", "strip", "bc", "bison", "flex", "tar", "xz")
_PACKAGES = "gcc make bc bison flex libelf-dev xz-utils"
_LIBELF = "/usr/include/gelf.h"  # the kernel's own tool for object files is compiled with it
# A third of the files: other CPUs, pages and tests. No x86 kernel is made of them; all Kconfig files are read, though.
_LEAVE_OUT = (
    *(f"*/arch/[!x]*/{name}/*" for name in ("boot", "configs", "include", "kernel", "mach-*")),
    "*/Documentation/*/*",
    "*/tools/testing/*",
    "*/tools/perf/*",
)
_STEP = re.compile(r"  [A-Z][A-Z0-9_ \[\]]{1,9} +\S")
_TELL_LOG_LINES = 8


class Source:
    """Where a kernel's source comes from. `path` "" is a package that has to be fetched.

    `label` tells it from all others, `shown` is for people.
    """

    __slots__ = ("label", "package", "path", "shown", "version")

    def __init__(self, path: str, package: str, version: str) -> None:
        """Describe a tarball at `path`, of a Debian `package` in its `version`."""
        self.path = path
        self.package = package
        self.version = version
        self.label = f"{package} {version}"
        self.shown = package if version.startswith("sha256:") else self.label


def build(
    state: str,
    *,
    say: "Callable[[str], None]",
    progress: "Callable[[int, float], None]" = lambda _done, _elapsed_s: None,
    jobs: int = 0,
    config: str = "",
    source: str = "",
) -> "tuple[Kernel, bool]":
    """Return the kernel built of the newest installed kernel source, else of apt's, and whether it was built now.

    `jobs` compilers run at once, 0 is one for each CPU. `config` is a file with more options, which win over ours.
    `source` is another tarball. `say` is told each step, `progress` the files done and the seconds since the start.
    Raises HostError; when the compilation fails its log is kept.
    """
    check_machine()
    chosen = _given(source) if source else _find()
    options = _options(chosen, config)
    digest = f"sha256:{hashlib.sha256(fragment.lines(options).encode()).hexdigest()}"
    need(*_PROGRAMS, package=_PACKAGES)
    compiler = debian.ask("gcc", "--version").partition("\n")[0]
    room = _ROOM_BYTES + (0 if chosen.path else _DOWNLOADED_BYTES)
    there = store.by_source(state, store.BUILT, chosen.label, digest, compiler)
    if there is not None:
        return there, False
    _check_place(state)
    with store.making(state, lambda: say("waiting for another kernel command"), room_bytes=room) as (
        work,
        lock,
    ):
        there = store.by_source(state, store.BUILT, chosen.label, digest, compiler)
        if there is not None:
            return there, False
        try:
            job = _Build(work, lock, jobs or len(os.sched_getaffinity(0)), say, progress)
            vmlinux = job.run(chosen, options, os.path.join(kernels_dir(state), LOG))
            facts = elf.inspect(vmlinux)
            record = store.Record(
                kind=store.BUILT,
                release=facts.release,
                source=chosen.label,
                sha256=store.file_digest(vmlinux),
                size_bytes=os.path.getsize(vmlinux),
                acpi=facts.acpi,
                config=digest,
                compiler=compiler,
            )
            return store.publish(state, os.path.dirname(vmlinux), record), True
        except OSError as error:
            raise store.cannot("read or write", error.filename or work, error) from error


def _find() -> Source:
    found = [match for name in _listed(_SOURCES) if (match := _TARBALL.fullmatch(name))]
    if found:
        newest = max(found, key=_version)
        return _package(os.path.join(_SOURCES, newest[0]), f"{_PREFIX}{newest[1]}.{newest[2]}")
    package, version = debian.candidate(_META, _PREFIX)
    return Source("", package, version)


def _version(match: re.Match[str]) -> tuple[int, int]:
    return int(match[1]), int(match[2])


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _package(path: str, package: str) -> Source:
    version = debian.installed_version(package)
    return Source(path, package, version) if version else _given(path)


def _given(path: str) -> Source:
    """Describe a tarball by its content: no package says which version it is."""
    if not os.path.isfile(path):
        raise HostError(f"there is no file {path}", hint="--source takes the tar of a kernel's source")
    try:
        return Source(os.path.abspath(path), os.path.basename(path), store.file_digest(path))
    except OSError as error:
        raise store.cannot("read", path, error) from error


def _options(source: Source, config: str) -> dict[str, str]:
    found = re.search(r"(\d+)\.(\d+)", source.package)
    if found is None:
        raise HostError(
            f"{source.path} does not say which version of the kernel it is",
            hint="call it linux-6.1.tar.xz or the like",
        )
    version = _version(found)
    options = fragment.read(FRAGMENT, version)
    return {**options, **fragment.read(config, version)} if config else options


def _check_place(state: str) -> None:
    home = kernels_dir(state)
    if re.search(r"[\s:]", home):
        raise HostError(
            f"a kernel cannot be built in {home!r}: make takes no spaces or colons in a path",
            hint="set RINGFENCE_STATE_DIR to another place",
        )
    if not os.path.exists(_LIBELF):
        raise HostError("libelf-dev is not installed", hint=f"apt-get install {_PACKAGES}")


class _Build:
    """One compilation in the directory `work`."""

    def __init__(
        self,
        work: str,
        lock: int,
        jobs: int,
        say: "Callable[[str], None]",
        progress: "Callable[[int, float], None]",
    ) -> None:
        self._tree = os.path.join(work, "tree")
        self._kernel = os.path.join(work, "kernel")
        self._work = work
        self._lock = lock
        self._jobs = jobs
        self._say = say
        self._progress = progress
        self._steps = 0
        self._started_s = time.monotonic()

    def run(self, source: Source, options: dict[str, str], kept_log: str) -> str:
        """Return the path of the new vmlinux, alone in its directory. Raises HostError."""
        path = os.path.join(self._work, LOG)
        with open(path, "wb") as log:
            try:
                self._unpack(source, log)
                self._configure(source, options, log)
                self._say(f"compiling with {self._jobs} at once: about ten minutes of work for two CPUs")
                self._make(log, _BUILD_S, f"-j{self._jobs}", "vmlinux")
                return self._strip(log)
            except CommandFailed as error:
                log.flush()
                os.replace(path, kept_log)
                for line in error.last[-_TELL_LOG_LINES:]:
                    self._say(line)
                raise HostError(error.message, hint=f"all that was said is in {kept_log}") from error

    def _unpack(self, source: Source, log: "IO[bytes]") -> None:
        path = source.path
        if not path:
            self._say(f"fetching {source.shown}")
            tree = debian.fetch(source.package, source.version, self._work, self._lock)
            names = [name for name in _listed(tree + _SOURCES) if _TARBALL.fullmatch(name)]
            if len(names) != 1:
                raise HostError(f"the package {source.package} has no source of a kernel in it")
            path = os.path.join(tree + _SOURCES, names[0])
        self._say(f"unpacking {source.shown}")
        os.mkdir(self._tree, 0o700)
        owners = ["--no-same-owner", "--no-same-permissions"]
        less = ["--anchored", "--no-wildcards-match-slash", *(f"--exclude={one}" for one in _LEAVE_OUT)]
        tar = ["tar", "-x", *owners, *less, "--strip-components=1", "-f", path]
        self._run(tar, log, _UNPACK_S)

    def _configure(self, source: Source, options: dict[str, str], log: "IO[bytes]") -> None:
        self._say(f"configuring: tinyconfig and {len(options)} options")
        self._make(log, _CONFIGURE_S, "tinyconfig")
        config = os.path.join(self._tree, ".config")
        with open(config, "a", encoding="utf-8") as file:
            file.write(fragment.lines(options))  # the last word counts
        self._make(log, _CONFIGURE_S, "olddefconfig")
        with open(config, encoding="utf-8", errors="replace") as file:
            missed = fragment.missed(options, file.read())
        if missed:
            more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
            raise HostError(
                f"these options do not take effect in {source.shown}: {', '.join(missed[:5])}{more}",
                hint="they need another one, or are called otherwise there; see Kconfig of that source",
            )

    def _strip(self, log: "IO[bytes]") -> str:
        """Leave the symbols out, which nothing in the guest reads: the file is read at each boot."""
        os.mkdir(self._kernel, 0o700)
        vmlinux = os.path.join(self._kernel, "vmlinux")
        self._run(["strip", "--strip-all", "-o", vmlinux, "vmlinux"], log, _CONFIGURE_S)
        shutil.rmtree(self._tree, ignore_errors=True)
        return vmlinux

    def _make(self, log: "IO[bytes]", timeout_s: float, *targets: str) -> None:
        # Nothing of this machine, user or day goes into the file.
        said_by = ["KBUILD_BUILD_USER=ringfence", "KBUILD_BUILD_HOST=ringfence", "KBUILD_BUILD_VERSION=1"]
        when = ["KBUILD_BUILD_TIMESTAMP=1970-01-01"]
        self._run(["make", "ARCH=x86_64", *said_by, *when, *targets], log, timeout_s)

    def _run(self, argv: list[str], log: "IO[bytes]", timeout_s: float) -> None:
        run(argv, cwd=self._tree, timeout_s=timeout_s, lock=self._lock, log=log, heard=self._heard)

    def _heard(self, line: str) -> None:
        if _STEP.match(line):
            self._steps += 1
        self._progress(self._steps, time.monotonic() - self._started_s)
