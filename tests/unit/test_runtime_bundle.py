"""From a plan to one sandbox's config.json: what differs is filled in, and nothing of the plan changes."""

import copy
import json
import os
from pathlib import Path

import plan_inputs as inputs
import pytest

from ringfence.errors import HostError
from ringfence.plan.config import BY_RUN
from ringfence.plan.document import Plan
from ringfence.plan.make import make_plan
from ringfence.runtime.base import Instance
from ringfence.runtime.bundle import command, instantiate, write_config
from ringfence.runtime.rootless import ranges

PLANS: dict[str, Plan] = {
    "root": make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V1),
    "user": make_plan(inputs.policy(), inputs.BASE, inputs.USER_V2),
}


def instance_in(directory: Path | str) -> Instance:
    return Instance(
        id="0123456789ab",
        directory=str(directory),
        staging="/run/ringfence/staging",
        base=0x70000000,
        cgroup_path="/ringfence/0123456789ab",
    )


def test_what_differs_is_filled_in_and_nothing_else() -> None:
    """Root, host name, ids, user namespace and cgroup are the sandbox's own."""
    plan = PLANS["root"]
    before = copy.deepcopy(plan)
    oci = instantiate(plan, instance_in("/run/x"), userns="/proc/1/fd/7")
    assert plan == before
    assert oci["root"] == {"path": "/run/ringfence/staging/root", "readonly": True}
    assert oci["hostname"] == "0123456789ab"
    assert oci["linux"]["cgroupsPath"] == "/ringfence/0123456789ab"
    mapping = [{"containerID": 0, "hostID": 0x70000000, "size": 65536}]
    assert oci["linux"]["uidMappings"] == oci["linux"]["gidMappings"] == mapping
    assert {"type": "user", "path": "/proc/1/fd/7"} in oci["linux"]["namespaces"]
    assert BY_RUN not in json.dumps(oci)
    back = copy.deepcopy(oci)
    for key in ("root", "hostname"):
        back[key] = before["oci"][key]  # type: ignore[literal-required]
    for key in ("namespaces", "uidMappings", "gidMappings", "cgroupsPath"):
        back["linux"][key] = before["oci"]["linux"][key]  # type: ignore[literal-required]
    assert back == before["oci"]


def test_a_users_sandbox_makes_no_second_user_namespace() -> None:
    """It is set up inside one; the runtime gets no map and no namespace to join."""
    oci = instantiate(PLANS["user"], instance_in("/run/x"), userns="")
    assert "user" not in {space["type"] for space in oci["linux"]["namespaces"]}
    assert oci["linux"]["uidMappings"] == oci["linux"]["gidMappings"] == []
    assert BY_RUN not in json.dumps(oci)


def test_a_users_ids_are_his_own_as_root_and_a_range() -> None:
    """Inside, 0 is the caller, and all others are subordinate ids of this sandbox alone."""
    size = PLANS["user"]["user"]["range_size"]
    assert ranges(PLANS["user"], instance_in("/run/x"), 1000) == [(0, 1000, 1), (1, 0x70000001, size - 1)]


def test_two_sandboxes_of_one_plan_share_nothing() -> None:
    """A plan is kept and used again: one sandbox's ids must not show in the next one's."""
    first = instantiate(PLANS["root"], instance_in("/a"), userns="/proc/1/fd/7")
    first["linux"]["uidMappings"][0]["size"] = 1
    again = instantiate(PLANS["root"], instance_in("/b"), userns="/proc/1/fd/8")
    assert again["linux"]["uidMappings"][0]["size"] == 65536
    assert {"type": "user", "path": "/proc/1/fd/8"} in again["linux"]["namespaces"]


def test_the_bundle_is_the_callers_alone(tmp_path: Path) -> None:
    """Nobody else can read it, and it is not written through anything that lies there already."""
    instance = instance_in(tmp_path)
    write_config(PLANS["root"], instance, userns="/proc/1/fd/7")
    path = tmp_path / "config.json"
    assert path.stat().st_mode & 0o777 == 0o600
    written = json.loads(path.read_text())
    assert written == instantiate(PLANS["root"], instance, userns="/proc/1/fd/7")
    with pytest.raises(HostError, match="File exists"):
        write_config(PLANS["root"], instance, userns="")
    path.unlink()
    os.symlink("/dev/full", path)
    with pytest.raises(HostError, match=r"cannot write .*/config\.json") as caught:
        write_config(PLANS["root"], instance, userns="")
    assert "RINGFENCE_RUN_DIR" in caught.value.hint


def test_the_runtimes_command_line_has_no_shell_and_no_search() -> None:
    """An absolute program, a state directory of the sandbox's own, the descriptors that are meant."""
    argv = command(PLANS["root"], instance_in("/run/x"), preserve=3)
    assert argv == [
        "/usr/bin/crun",
        "--root",
        "/run/x/runtime",
        "run",
        "--detach",
        "--preserve-fds",
        "3",
        "--bundle",
        "/run/x",
        "0123456789ab",
    ]
    assert command(PLANS["root"], instance_in("/run/x"), preserve=3, options=("--rootless", "true"))[3:5] == [
        "--rootless",
        "true",
    ]
