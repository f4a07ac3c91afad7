"""Sandboxes as tests use them: started through the Python API, asked through JSON, held while the test looks."""

import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ringfence

# Somebody who is nobody on the host: as controls run, outside of any sandbox.
USER = 61234
# cgroup v1 does not throttle writes of the page cache, so a policy with a writable mount has to accept that.
UNTHROTTLED = ("limits.io.write", "limits.io.write_iops")
Plain = bool | int | float | str | list["Plain"] | dict[str, "Plain"] | None


def bind(source: Path | str, target: str, mode: str = "ro", **more: object) -> dict[str, object]:
    """Return one mount of a policy."""
    return {"source": str(source), "target": target, "mode": mode, **more}


class Sandboxes:
    """Starts sandboxes of one runtime and tier under `untrusted`; `limits` and the like are overrides."""

    def __init__(self, runtime: str, probes: Path, isolation: str = "linux") -> None:
        self.runtime = runtime
        self.probes = probes
        self.isolation = isolation

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
        if self.isolation == "gvisor" and str(fields.get("user")).startswith("0:"):
            # What root of a gVisor sandbox writes to its /dev is bounded by memory alone.
            more["allow_unenforced"] = (*more.get("allow_unenforced", ()), "limits.disk", "limits.inodes")  # type: ignore[misc]
        more.setdefault("isolation", self.isolation)
        # Openly: on a machine without working KVM the microVM is the same, and its boundary is not hardware.
        more.setdefault("allow_emulation", self.isolation == "microvm")
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
            assert thread.is_alive(), self.error or (self.result and self.result.stderr)
            time.sleep(0.005)
        self.said = json.loads(here.read_text())
