"""What all tests share: needs of the machine, sandboxes of both runtimes, and the check that nothing is left."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import leftovers
import pytest
from needs import COMPILERS, PROBES

import ringfence

HERE = Path(__file__).parent
# Somebody who is nobody on the host: as controls run, outside of any sandbox.
USER = 61234
# cgroup v1 does not throttle writes of the page cache, so a policy with a writable mount has to accept that.
UNTHROTTLED = ("limits.io.write", "limits.io.write_iops")
Plain = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("requires"):
        for need in mark.args:
            reason = PROBES[need]()  # an unknown need is a KeyError, not a skip
            if reason and os.environ.get("RINGFENCE_STRICT"):
                pytest.fail(f"{need} is required here: {reason}", pytrace=False)
            if reason:
                pytest.skip(f"needs {need}: {reason}")


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
    for need in ("root", "userns", "image:base", request.param):
        reason = PROBES[need]()
        if reason and os.environ.get("RINGFENCE_STRICT"):
            pytest.fail(f"{need} is required here: {reason}", pytrace=False)
        if reason:
            pytest.skip(f"needs {need}: {reason}")
    return str(request.param)


class Sandboxes:
    """Starts sandboxes of one runtime under `untrusted`; `limits` and the like are overrides."""

    def __init__(self, runtime: str, probes: Path) -> None:
        self.runtime = runtime
        self.probes = probes

    def run(
        self,
        argv: Sequence[str | bytes],
        overrides: dict[str, object] | None = None,
        *,
        timeout: float = 30,
        **more: object,
    ) -> ringfence.Result:
        """Run `argv`; the programs of tests/probe are in /probe, unless the policy is not this one."""
        fields = dict(overrides or {})
        mounts = list(fields.get("filesystem.mounts", []))  # type: ignore[call-overload]
        if not any(mount["target"] == "/probe" for mount in mounts):
            mounts.append(bind(self.probes, "/probe"))
        fields["filesystem.mounts"] = mounts
        if any(mount.get("mode") == "rw" for mount in mounts):
            more.setdefault("allow_unenforced", UNTHROTTLED)
        return ringfence.run(argv, runtime=self.runtime, timeout=timeout, overrides=fields, **more)  # type: ignore[arg-type]

    def ask(self, code: str, overrides: dict[str, object] | None = None, **more: object) -> dict[str, Plain]:
        """Run a Python program that prints JSON; return that. It may use `out(value)` to print it."""
        prelude = "import json, os, sys\ndef out(value): print(json.dumps(value))\n"
        result = self.run(["python3", "-c", prelude + code], overrides, **more)
        assert result.exit_status == 0, result.stderr.decode(errors="replace")
        answer: dict[str, Plain] = json.loads(result.stdout)
        return answer

    @contextlib.contextmanager
    def held(self, code: str, overrides: dict[str, object] | None = None, **more: object) -> Iterator["Held"]:
        """Run a Python program that calls `hold(value)` beside the test, and let it end afterwards."""
        directory = Path(tempfile.mkdtemp(prefix="ringfence-held-"))
        mounts = [bind(directory, "/held", "rw"), *(overrides or {}).get("filesystem.mounts", [])]  # type: ignore[misc]
        held = Held(directory)

        def body() -> None:
            fields = {**(overrides or {}), "filesystem.mounts": mounts}
            try:
                held.result = self.run(["python3", "-c", _HOLD + code], fields, **more)  # type: ignore[arg-type]
            except ringfence.RingfenceError as error:
                held.error = error

        thread = threading.Thread(target=body)
        thread.start()
        try:
            held.wait(thread)
            yield held
        finally:
            (directory / "go").touch()
            thread.join(40)
            shutil.rmtree(directory)
        assert not thread.is_alive()


_HOLD = """import json, os, sys, time
def hold(value):
    with open('/held/new', 'w') as file: json.dump(value, file)
    os.rename('/held/new', '/held/here')
    while not os.path.exists('/held/go'): time.sleep(0.01)
"""


class Held:
    """A sandbox that waits for the test, and what it had to say."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said: dict[str, Plain] = {}
        self.result: ringfence.Result | None = None
        self.error: ringfence.RingfenceError | None = None

    def wait(self, thread: threading.Thread) -> None:
        """Return once the program has called hold()."""
        here = self.directory / "here"
        while not here.exists():
            assert thread.is_alive(), self.error or self.result and self.result.stderr
            time.sleep(0.005)
        self.said = json.loads(here.read_text())


@pytest.fixture(scope="session")
def sandboxes(runtime: str, home: Path, probes: Path) -> Sandboxes:
    """Sandboxes of both runtimes, one after the other."""
    return Sandboxes(runtime, probes)


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of the compiled programs of tests/probe; everybody may read it."""
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs compiler: no C compiler")
    directory = Path(tempfile.mkdtemp(prefix="ringfence-probe-"))
    directory.chmod(0o755)
    for source in (HERE / "probe").glob("*.c"):
        command = [compiler, "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", directory / source.stem, source]
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

    def run(argv: Sequence[str | Path], *, root: bool = False, **more: object) -> "subprocess.CompletedProcess[bytes]":
        who: dict[str, object] = {} if root else {"user": USER, "group": USER, "extra_groups": []}
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, "cwd": "/", **who, **more}
        return subprocess.run(argv, start_new_session=True, **options)  # type: ignore[call-overload,no-any-return]

    return run


def bind(source: Path | str, target: str, mode: str = "ro", **more: object) -> dict[str, object]:
    """Return one mount of a policy."""
    return {"source": str(source), "target": target, "mode": mode, **more}
