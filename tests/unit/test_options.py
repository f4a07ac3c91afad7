"""Every option of `run` and `plan` is one field of the policy, and a bad value is said to be one."""

import os

import pytest

from ringfence.cli import run as run_verb
from ringfence.cli.options import environment, request, split
from ringfence.errors import RingfenceError, UsageError
from ringfence.host.enforce import leaves
from ringfence.policy.load import load
from ringfence.policy.model import Mount
from ringfence.sandbox.prepare import Request, policy_for


def asked(*words: str) -> Request:
    return request(run_verb.parser().parse_args([*words, "true"]))


OPTIONS: list[tuple[list[str], str, object]] = [
    (["-i", "linux"], "isolation", "linux"),
    (["--isolation", "linux"], "isolation", "linux"),
    (["-m", "64m"], "limits.memory", 64 << 20),
    (["--memory", "1GiB"], "limits.memory", 1 << 30),
    (["--cpus", "1.5"], "limits.cpus", 1.5),
    (["--cpuset-cpus", "0-1"], "limits.cpuset", "0-1"),
    (["--pids-limit", "100"], "limits.pids", 100),
    (["--shm-size", "1m"], "limits.shm", 1 << 20),
    (["--timeout", "1m30s"], "limits.time", 90.0),
    (["--read-only=false"], "filesystem.root", "writable"),
    (["--read-only=true"], "filesystem.root", "read-only"),
    (["--tmpfs", "/tmp:size=1m"], "filesystem.tmp", 1 << 20),
    (["--tmpfs", "/tmp:noexec,size=2m"], "filesystem.tmp", 2 << 20),
    (["-u", "7"], "user", "7:7"),
    (["--user", "7:8"], "user", "7:8"),
    (["--cap-add", "NET_RAW", "--cap-add", "chown"], "capabilities", ("CAP_CHOWN", "CAP_NET_RAW")),
    (["--network", "none"], "network.mode", "none"),
    (["--ulimit", "nofile=99"], "limits.open_files", 99),
    (["--ulimit", "nproc=9"], "limits.threads", 9),
    (["--ulimit", "stack=1048576:1048576"], "limits.stack", 1 << 20),
    (["--ulimit", "fsize=4096"], "limits.file_size", 4096),
    (["--sysctl", "kernel.msgmax=1"], "sysctls", {"kernel.msgmax": "1"}),
    (["--device", "/dev/fuse"], "devices", ("/dev/fuse:rw",)),
    (["--security-opt", "seccomp=strict"], "seccomp", "strict"),
    (["--security-opt", "no-new-privileges"], "no_new_privileges", True),
    (["--security-opt", "no-new-privileges:false"], "no_new_privileges", False),
    (["--security-opt", "apparmor=unconfined"], "lsm", "none"),
    (["--security-opt", "apparmor=ringfence-default"], "lsm", "required"),
    (["-v", "/srv/x:/x"], "filesystem.mounts", (Mount(source="/srv/x", target="/x"),)),
    (["-v", "/srv/x:/x:rw"], "filesystem.mounts", (Mount(source="/srv/x", target="/x", mode="rw"),)),
    (["-v", "/srv/a:b:/x:ro"], "filesystem.mounts", (Mount(source="/srv/a:b", target="/x"),)),
    (["--set", "limits.disk=1GiB"], "limits.disk", 1 << 30),
    (["--set", "limits.cpus=0.5"], "limits.cpus", 0.5),
    (["--set", "limits.time=null"], "limits.time", None),
    (["--set", "filesystem.sysfs=true"], "filesystem.sysfs", True),
    (["--set", 'capabilities=["KILL"]'], "capabilities", ("CAP_KILL",)),
    (["--set", 'sysctls={"kernel.sem": "1 2 3 4"}'], "sysctls", {"kernel.sem": "1 2 3 4"}),
]


@pytest.mark.parametrize(("words", "field", "value"), OPTIONS, ids=lambda value: str(value))
def test_an_option_sets_its_field_and_no_other(words: list[str], field: str, value: object) -> None:
    """The policy is the preset with that one field changed (and threads with --pids-limit)."""
    before, after = leaves(load("untrusted")), leaves(policy_for(asked(*words)))
    assert after[field] == value
    changed = {name for name in after if after[name] != before[name]}
    assert changed <= {field, *(["limits.threads"] if words[0] == "--pids-limit" else [])}


def test_the_pids_limit_brings_the_threads_along() -> None:
    """docker has the one option for both."""
    assert leaves(policy_for(asked("--pids-limit", "10")))["limits.threads"] == 10


def test_what_is_not_of_the_policy() -> None:
    """Image, runtime and what may go unenforced, also as one list."""
    made = asked("--image", "host", "--runtime", "runc", "--allow-unenforced", "user,limits.pids")
    assert (made.image, made.runtime, made.allow_unenforced) == ("host", "runc", ("limits.pids", "user"))
    assert asked("--rootfs", "/srv").rootfs == "/srv"
    assert asked("--policy", "ci").policy == "ci"
    assert asked("--policy", "own.yaml").policy == os.path.abspath("own.yaml")


def test_publishing_a_port_is_a_network_of_ports() -> None:
    """As with docker nobody has to say it twice; a mode that was given stays."""
    assert asked("-p", "8080:80").overrides["network.mode"] == "ports"
    assert asked("-p", "8080:80", "--network", "egress").overrides["network.mode"] == "egress"


def test_lists_are_added_to_what_the_policy_has(tmp_path: os.PathLike[str]) -> None:
    """A mount on the command line does not take those of the policy away."""
    path = os.path.join(tmp_path, "own.yaml")
    with open(path, "w") as file:
        file.write("capabilities: [KILL]\nsysctls: {kernel.msgmax: 1}\n")
    policy = policy_for(asked("--policy", path, "--cap-add", "CHOWN", "--sysctl", "kernel.sem=1 2 3 4"))
    assert policy.capabilities == ("CAP_CHOWN", "CAP_KILL")
    assert policy.sysctls == {"kernel.msgmax": "1", "kernel.sem": "1 2 3 4"}


BAD = [
    (["--pids-limit", "many"], "--pids-limit 'many' is not a whole number"),
    (["--pids-limit=-1"], "--pids-limit '-1'"),
    (["--read-only=perhaps"], "neither true nor false"),
    (["--tmpfs", "/var:size=1m"], "two writable directories"),
    (["--tmpfs", "/tmp"], "two writable directories"),
    (["--ulimit", "nofile"], "is not NAME=N"),
    (["--ulimit", "nofile=1:2"], "always the same here"),
    (["--ulimit", "nofile=x"], "is not a whole number"),
    (["--ulimit", "locks=1"], "one of: nofile"),
    (["--sysctl", "kernel.msgmax"], "is not NAME=VALUE"),
    (["--security-opt", "seccomp=unconfined"], "no sandbox runs without seccomp"),
    (["--security-opt", "apparmor=other"], "is not known"),
    (["--security-opt", "label=disable"], "is not known"),
    (["--security-opt", "no-new-privileges=maybe"], "neither true nor false"),
    (["-v", "/srv"], "is not SOURCE:/TARGET"),
    (["-v", ":/x"], "is not SOURCE:/TARGET"),
    (["-v", "/srv:x"], "is not SOURCE:/TARGET"),
    (["--set", "limits.memory"], "is not FIELD=VALUE"),
    (["--set", "=1"], "is not FIELD=VALUE"),
    (["--set", "capabilities=[KILL]"], "written as JSON"),
    (["--set", "limits.memory={"], "written as JSON"),
    (["--bogus"], "unrecognized arguments: --bogus"),
    (["--memory"], "expected one argument"),
    (["--isolation", "chroot"], "invalid choice"),
    (["--mem", "1g"], "unrecognized arguments"),
]


@pytest.mark.parametrize(("words", "part"), BAD, ids=lambda value: str(value))
def test_a_bad_value_names_its_option(words: list[str], part: str) -> None:
    """One line, exit status 2, before anything is looked at."""
    with pytest.raises(UsageError) as caught:
        request(run_verb.parser().parse_args(words if words == ["--memory"] else [*words, "true"]))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("words", "ours", "command"),
    [
        (["--rm", "true", "-x"], ["--rm", "true", "-x"], None),
        (["--rm", "--", "true", "--", "-it"], ["--rm"], ["true", "--", "-it"]),
        (["-it", "--", "sh"], ["--interactive", "--tty"], ["sh"]),
        (["-ti", "sh"], ["--interactive", "--tty", "sh"], None),
        (["--", "-it"], [], ["-it"]),
        (["--"], [], []),
        ([], [], None),
    ],
)
def test_the_command_begins_after_two_dashes(
    words: list[str], ours: list[str], command: list[str] | None
) -> None:
    """What stands after them is never read as an option of ours."""
    assert split(words) == (ours, command)


def test_options_of_the_command_are_its_own() -> None:
    """The first word that is no option begins the command, and all that follows is the command's."""
    args = run_verb.parser().parse_args(["--memory", "1g", "ls", "--memory", "2g", "-v", "x"])
    assert args.memory == "1g"
    assert args.command == ["ls", "--memory", "2g", "-v", "x"]


def test_the_environment_is_what_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name alone takes the caller's value; nothing else of the caller's gets in."""
    monkeypatch.setenv("GIVEN", "1=2\n")
    monkeypatch.delenv("ABSENT", raising=False)
    assert environment(["A=b=c", "EMPTY=", "GIVEN"]) == ["A=b=c", "EMPTY=", "GIVEN=1=2\n"]
    for item in ("=x", "", "ABSENT"):
        with pytest.raises(UsageError):
            environment([item])


def test_a_field_that_does_not_exist_is_a_policy_error() -> None:
    """--set takes any field of the policy, and the nearest one is named for another."""
    with pytest.raises(RingfenceError, match="did you mean"):
        policy_for(asked("--set", "limits.memroy=1g"))
