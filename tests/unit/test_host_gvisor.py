"""What is asked of a runsc, and how long what it answered is believed."""

import os
from pathlib import Path

import msgspec
import pytest

from ringfence.host import gvisor
from ringfence.host.facts import GvisorFacts, Host, Runtime
from ringfence.plan.gvisor import flags
from ringfence.policy.load import load

OLD_RUN = """\
run [flags] <container id> - create and run a secure container.
  -bundle string
      path to the root of the bundle directory; a --pass-fd would be nice
  -detach
      detach from the container's process
  -user-log string
      filename to send user-visible logs to
"""
OLD_FLAGS = """\
  -debug-log string
      additional location for logs
  -directfs
      directly access the container filesystems from the sentry
  -host-uds value
      controls permission to access host Unix-domain sockets
  -network value
      which network to use
  -overlay
      wrap mounts with overlayfs
  -root string
      root directory for storage of container state
  --platform string
      specifies which platform to use
"""


def runsc(directory: Path, script: str) -> Host:
    """Return a host whose runsc is this shell script."""
    program = directory / "runsc"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Host(euid=os.geteuid(), runtimes={"runsc": Runtime(path=str(program))})


def test_an_old_runsc_is_told_by_its_flags(tmp_path: Path) -> None:
    """Every flag that is needed and not listed is named; one that only a description mentions is not there."""
    (tmp_path / "run").write_text(OLD_RUN)
    (tmp_path / "flags").write_text(OLD_FLAGS)
    host = runsc(tmp_path, f'[ "$1" = help ] && exec cat {tmp_path}/run >&2; exec cat {tmp_path}/flags')
    assert gvisor.gvisor_facts(host) == GvisorFacts(
        missing=(
            "--pass-fd",
            "--allow-flag-override",
            "--debug",
            "--debug-command",
            "--debug-log-format",
            "--file-access-mounts",
            "--host-fifo",
            "--ignore-cgroups",
            "--net-raw",
            "--nvproxy",
            "--oci-seccomp",
            "--overlay2",
            "--panic-log",
            "--strace",
            "--tpuproxy",
        )
    )


def test_every_flag_of_a_plan_is_asked_for() -> None:
    """A runsc without one of the flags that a plan passes is told beforehand, not by a start that fails."""
    passed = {flag.removeprefix("--").partition("=")[0] for flag in flags(load("hostile"), "systrap")}
    assert passed
    assert passed <= set(gvisor._GLOBAL_FLAGS)


@pytest.mark.parametrize("script", ["exec yes", "exit 1", "kill -9 $$", "sleep 60 & exec sleep 60"])
def test_a_runsc_that_answers_nonsense_has_no_flags(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood, a failure, a crash or silence is a runsc without flags, soon; nothing is tried with it."""
    monkeypatch.setattr(gvisor, "ASK_S", 0.3)
    facts = gvisor.gvisor_facts(runsc(tmp_path, script))
    assert facts is not None
    assert "--pass-fd" in facts.missing
    assert facts.platforms == ()


def test_a_host_without_runsc_is_not_asked(tmp_path: Path) -> None:
    """Without runsc there are no facts, and nothing is kept."""
    host = Host()
    assert gvisor.with_gvisor(host, str(tmp_path / "kept")) == host
    assert os.listdir(tmp_path) == []


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GvisorFacts]:
    """What the next trials find, taken from the front; the key of the host stays the same."""
    facts: list[GvisorFacts] = []
    monkeypatch.setattr(gvisor, "gvisor_facts", lambda _: facts.pop(0))
    monkeypatch.setattr(gvisor, "host_key", lambda: "key")
    return facts


def test_what_works_is_kept(
    found: list[GvisorFacts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A platform that worked is not tried again until the key changes, or others could have written the file."""
    host, file = runsc(tmp_path, "exit 1"), tmp_path / "gvisor.json"
    works = GvisorFacts(platforms=("systrap",), reasons={"kvm": "KVM is absent"})
    found += [works, GvisorFacts(), works, GvisorFacts()]
    for _ in range(3):
        assert gvisor.with_gvisor(host, str(file)) == msgspec.structs.replace(host, gvisor=works)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o622)
    assert gvisor.with_gvisor(host, str(file)).gvisor == GvisorFacts()
    file.unlink()
    assert gvisor.with_gvisor(host, str(file)).gvisor == works
    monkeypatch.setattr(gvisor, "host_key", lambda: "another")
    assert gvisor.with_gvisor(host, str(file)).gvisor == GvisorFacts()


def test_a_failure_is_not_kept(found: list[GvisorFacts], tmp_path: Path) -> None:
    """A trial that failed, perhaps under load, and a slower platform are not believed the next time."""
    host, file = runsc(tmp_path, "exit 1"), tmp_path / "gvisor.json"
    outcomes = [
        GvisorFacts(platforms=("ptrace",), reasons={"systrap": "did not run a program within 1 s"}),
        GvisorFacts(missing=("--pass-fd",)),
        GvisorFacts(),
        GvisorFacts(platforms=("systrap",)),
    ]
    found += outcomes
    assert [gvisor.with_gvisor(host, str(file)).gvisor for _ in outcomes] == outcomes
