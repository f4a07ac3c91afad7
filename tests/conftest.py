"""What all tests share: needs of the machine, sandboxes of both runtimes, and the check that nothing is left."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import leftovers
from boxes import USER, Sandboxes
from detached import Cli, until
from needs import COMPILERS, PROBES
from ringfence.sandbox import store

HERE = Path(__file__).parent
_MACHINE = ("root", "userns", "image:base", "crun", "qemu", "kernel", "mkfs.erofs")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        _require(*mark.args)


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A run directory of this session's own; id ranges stay the host's, images those of the state directory."""
    # Not pytest's: sandboxes must be able to pass through it, and a socket's path in it must be short.
    directory = Path(tempfile.mkdtemp(prefix="ringfence-run-"))
    directory.chmod(0o711)
    before = os.environ.get("RINGFENCE_RUN_DIR")
    os.environ["RINGFENCE_RUN_DIR"] = str(directory)
    _final_check["home"] = directory
    yield directory
    if before is None:
        del os.environ["RINGFENCE_RUN_DIR"]
    else:
        os.environ["RINGFENCE_RUN_DIR"] = before


_final_check: dict[str, Path] = {}


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """No test of the session leaves a process, cgroup, mount, id range or directory, or a changed node."""
    before, nodes = leftovers.found(None), leftovers.nodes()
    yield
    directory = _final_check.get("home")
    remains = leftovers.left(before, directory)
    if directory is not None:
        shutil.rmtree(directory)
    assert remains == []
    assert leftovers.nodes() == nodes


@pytest.fixture(scope="session", params=["crun", "runc"])
def runtime(request: pytest.FixtureRequest) -> str:
    """Each runtime of the linux tier after the other."""
    _require("root", "userns", "image:base", request.param)
    return str(request.param)


def _require(*needs: str) -> None:
    for need in needs:
        reason = PROBES[need]()  # an unknown need is a KeyError, not a skip
        if reason and os.environ.get("RINGFENCE_STRICT"):
            pytest.fail(f"{need} is required here: {reason}", pytrace=False)
        if reason:
            pytest.skip(f"needs {need}: {reason}")


@pytest.fixture(scope="session")
def sandboxes(runtime: str, home: Path, probes: Path) -> Sandboxes:
    """Sandboxes of both runtimes, one after the other."""
    return Sandboxes(runtime, probes)


@pytest.fixture(scope="session")
def guests(home: Path, probes: Path) -> Sandboxes:
    """Sandboxes of the gVisor tier, in rings made by crun."""
    _require("root", "userns", "image:base", "crun", "runsc")
    return Sandboxes("crun", probes, isolation="gvisor")


@pytest.fixture(scope="session")
def machines(home: Path, probes: Path) -> Sandboxes:
    """Sandboxes of the microVM tier, emulated where KVM does not work, in rings made by crun."""
    _require(*_MACHINE)
    return Sandboxes("crun", probes, isolation="microvm")


@pytest.fixture
def cli(home: Path) -> Iterator[Cli]:
    """The command line; whatever a test leaves is removed with it, and nothing of it may be left."""
    yield from _and_nothing_left(Cli(home))


@pytest.fixture
def gvisor(home: Path) -> Iterator[Cli]:
    """The same, at the gVisor tier."""
    _require("root", "userns", "image:base", "crun", "runsc")
    yield from _and_nothing_left(Cli(home, isolation="gvisor"))


@pytest.fixture
def microvm(home: Path) -> Iterator[Cli]:
    """The same, at the microVM tier."""
    _require(*_MACHINE)
    yield from _and_nothing_left(Cli(home, isolation="microvm"))


@pytest.fixture(scope="module")
def booted(home: Path, probes: Path) -> Iterator[Cli]:
    """One detached machine "box" for all tests of a module, asked with exec: a boot takes seconds where it is emulated.

    Not together with `microvm`, which removes all that there is.
    """
    _require(*_MACHINE)
    made = Cli(home, isolation="microvm")
    made.detached("sleep", "900", options=("--timeout", "900", "-v", f"{probes}:/probe"))
    try:
        yield made
    finally:
        made("rm", "--force", "box")


def _and_nothing_left(made: Cli) -> Iterator[Cli]:
    yield made
    for process in made.started:
        process.kill()
        process.communicate()
    made.look()
    made("rm", "--all", "--force", status=None)
    until(lambda: not any(entry.alive() for entry in store.entries()))
    made("gc")
    assert made.remains() == []


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of the compiled programs of tests/probe; everybody may read it."""
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs compiler: no C compiler")
    directory = Path(tempfile.mkdtemp(prefix="ringfence-probe-"))
    directory.chmod(0o755)
    for source in (HERE / "probe").glob("*.c"):
        command = [
            compiler,
            "-static",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-pthread",
            "-o",
            directory / source.stem,
            source,
        ]
        subprocess.run(command, check=True)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A directory that an unprivileged user can reach and that belongs to one: what people mount."""
    directory = Path(tempfile.mkdtemp(prefix="ringfence-shared-"))
    directory.chmod(0o755)
    os.chown(directory, USER, USER)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def outside() -> Callable[..., "subprocess.CompletedProcess[bytes]"]:
    """Run a control: the same program without a sandbox, as `USER` or, with root=True, as root."""

    def run(
        argv: Sequence[str | Path], *, root: bool = False, **more: object
    ) -> "subprocess.CompletedProcess[bytes]":
        who: dict[str, object] = {} if root else {"user": USER, "group": USER, "extra_groups": []}
        options = {
            "stdin": subprocess.DEVNULL,
            "capture_output": True,
            "timeout": 60,
            "cwd": "/",
            **who,
            **more,
        }
        return subprocess.run(argv, start_new_session=True, **options)  # type: ignore[call-overload,no-any-return]

    return run
