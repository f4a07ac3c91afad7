"""The AppArmor profile that is shipped: it compiles, has the name that plans ask for, and a missing one is told of."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
from test_host_enforce import ROOT_V1

import ringfence.host
from ringfence.host.checks import checks
from ringfence.host.facts import Host, Lsm
from ringfence.plan.config import APPARMOR_PROFILE
from ringfence.plan.document import Plan
from ringfence.plan.make import make_plan
from ringfence.plan.workload import Workload
from ringfence.policy.load import load, override

PROFILE = Path(ringfence.host.__file__).parent / "apparmor" / "ringfence-default"
# Everything that the ABI of the profile knows, whatever the kernel here has.
FEATURES = Path("/etc/apparmor.d/abi/3.0")
PARSER = shutil.which("apparmor_parser", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
WORKLOAD = Workload(image="base", image_digest="sha256:0", layers=("/var/lib/ringfence/x",), env=())

needs_parser = pytest.mark.skipif(
    PARSER is None or not FEATURES.exists(), reason="needs apparmor_parser: apt-get install apparmor"
)


def host(lsm: Lsm) -> Host:
    return msgspec.structs.replace(ROOT_V1, overlayfs=True, idmapped_mounts=True, lsm=lsm)


def plan(lsm: Lsm, /, **fields: object) -> Plan:
    return make_plan(override(load("untrusted"), fields), WORKLOAD, host(lsm))


def compiled(profile: Path) -> "subprocess.CompletedProcess[bytes]":
    """Compile without loading anything into the kernel and without touching a cache."""
    assert PARSER is not None
    options = ["--skip-kernel-load", "--skip-cache", "--stdout", "--kernel-features", str(FEATURES)]
    return subprocess.run(
        [PARSER, *options, "--warn=rule-not-enforced", "--warn=rule-downgraded", str(profile)],
        capture_output=True,
        timeout=60,
    )


@needs_parser
def test_the_profile_compiles_and_every_rule_counts() -> None:
    """The parser takes the profile, under its name, and says of no rule that it would not be enforced."""
    found = compiled(PROFILE)
    assert found.returncode == 0, found.stderr
    assert APPARMOR_PROFILE.encode() in found.stdout
    assert b"not enforce" not in found.stderr
    assert b"downgraded" not in found.stderr


@needs_parser
@pytest.mark.parametrize(
    "rule",
    [
        "file,",
        "capability,",
        "network inet stream,",
        "network netlink raw,",
        "unix,",
        "signal peer=ringfence-default,",
        "signal (receive) peer={unconfined,runc,crun},",
        "ptrace peer=ringfence-default,",
        "ptrace (readby, tracedby) peer={unconfined,runc,crun},",
    ],
)
def test_no_rule_that_allows_is_idle(rule: str, tmp_path: Path) -> None:
    """Without any one of the rules that allow something the compiled profile is another one."""
    text = PROFILE.read_text()
    assert text.count(f"  {rule}\n") == 1
    changed = tmp_path / "ringfence-default"
    changed.write_text(text.replace(f"  {rule}\n", ""))
    found = compiled(changed)
    assert found.returncode == 0, found.stderr
    assert found.stdout != compiled(PROFILE).stdout


def test_the_profile_denies_what_it_is_there_for() -> None:
    """Mounts, kernel files, raw and packet sockets and the label itself are denied in so many words."""
    denied = set(re.findall(r"^  deny (.*),$", PROFILE.read_text(), re.MULTILINE))
    assert {"mount", "remount", "umount", "pivot_root"} <= denied
    assert {"/proc/sys/** wkl", "/sys/** wkl", "/proc/*/attr/** wkl"} <= denied
    assert {"network packet", "network inet raw", "network inet6 raw"} <= denied


def test_doctor_says_how_to_load_the_profile() -> None:
    """Where AppArmor is on and the profile missing, the hint is a command with the path of the shipped file."""
    found = {check.name: check for check in checks(host(Lsm(apparmor=True)))}["security module"]
    assert found.level == "warn"
    assert f"install -m 644 {PROFILE} /etc/apparmor.d/" in found.advice
    assert f"apparmor_parser --replace /etc/apparmor.d/{APPARMOR_PROFILE}" in found.advice


def test_a_plan_says_when_the_label_is_missing() -> None:
    """`lsm: default` runs without the profile, and plan and proof say so; where there is no AppArmor, or none is
    asked, there is nothing to say."""
    missing = plan(Lsm(apparmor=True))
    reason = "AppArmor is on, but the profile ringfence-default is not loaded"
    assert missing["unenforced"] == [{"field": "lsm", "reason": reason}]
    assert "apparmorProfile" not in missing["oci"]["process"]
    assert plan(Lsm())["unenforced"] == []
    assert plan(Lsm(apparmor=True), lsm="none")["unenforced"] == []


def test_a_loaded_profile_is_asked_for_and_proved() -> None:
    """Where the profile is loaded the job gets it, and the proof must find it."""
    loaded = plan(Lsm(apparmor=True, apparmor_profile=True))
    assert loaded["unenforced"] == []
    assert loaded["oci"]["process"]["apparmorProfile"] == APPARMOR_PROFILE
    asked = {control["name"]: control["asked"] for control in loaded["controls"]}
    assert asked["lsm.apparmor"] == APPARMOR_PROFILE
