"""Bad input and a host that lacks something: one clear line, the promised exit status, and nothing left behind."""

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import RINGFENCE, refused, remains, ringfence, run
from ringfence import errors

pytestmark = pytest.mark.requires("root", "crun", "image:base", "userns")

NO_COMMAND = [
    (["nosuchcommand"], 127, "on the PATH of the image"),
    (["/usr/bin/nosuchcommand"], 127, "in the image"),
    (["./nosuchcommand"], 127, "in the image"),
    ([""], 127, "''"),
    (["/etc/hostname"], 126, "Permission denied"),
    (["/usr"], 126, "Permission denied"),
    (["--workdir", "/nosuch", "true"], 126, "working directory"),
]
BAD_OPTIONS = [
    ([], "no command was given"),
    (["--bogus", "true"], "unrecognized arguments: --bogus"),
    (["--memry", "64m", "true"], "did you mean --memory?"),
    (["--memory"], "expected one argument"),
    (["-i", "tent", "true"], "invalid choice: 'tent'"),
    (["--workdir", "rel", "true"], "is not an absolute path"),
    (["--env", "=x", "true"], "has no name"),
    (["--env", "RINGFENCE_NOT_SET", "true"], "not set here"),
    (["--name", "a/b", "true"], "letters, digits"),
    (["--name", b"\xff", "true"], "letters, digits"),
    (["--json", "--tty", "true"], "--json"),
    (["--json", "-d", "true"], "--json"),
    (["--proof", "/nosuch/proof.json", "true"], "'/nosuch/proof.json'"),
    (["--ulimit", "memlock=1", "true"], "one of: nofile"),
    (["--set", "limits.memory", "true"], "FIELD=VALUE"),
    (["--allow-unenforced", "limits.memroy", "true"], "did you mean 'limits.memory'?"),
    (["--volume", "data", "true"], "SOURCE:/TARGET"),
]
BAD_VALUES = [
    (["--policy", "untrustd"], "RF-POLICY", "unknown preset 'untrustd'; did you mean 'untrusted'?"),
    (["--policy", "./missing.yaml"], "RF-POLICY", "missing.yaml: No such file or directory"),
    (["--policy", "."], "RF-POLICY", "unknown preset '.'"),
    (["--policy", b"./\xff.yaml"], "RF-POLICY", "\\udcff.yaml"),
    (["--memory=-5m"], "RF-POLICY", "limits.memory: '-5m' is not a size"),
    (["--memory", "4k"], "RF-POLICY", "limits.memory: '4k' is not a size from 1MiB"),
    (["--memory", "99999999999999999999g"], "RF-POLICY", "limits.memory"),
    (["--memory", b"\xff"], "RF-POLICY", "limits.memory"),
    (["--cpus", "0"], "RF-POLICY", "limits.cpus"),
    (["--cpus", "1e9"], "RF-POLICY", "limits.cpus"),
    (["--pids-limit", "0"], "RF-POLICY", "limits.pids"),
    (["--timeout", "0"], "RF-POLICY", "limits.time"),
    (["--timeout", "9999d"], "RF-POLICY", "limits.time: '9999d' is not a duration from 1ms to 366 days"),
    (["--user", "0:0:0"], "RF-POLICY", "user"),
    (["--cap-add", "SYS_ADMINN"], "RF-POLICY", "did you mean CAP_SYS_ADMIN?"),
    (["--sysctl", "kernel.panic=1"], "RF-POLICY", "kernel.panic"),
    (["--set", "limits.memroy=1g"], "RF-POLICY", "did you mean 'memory'?"),
    (["--ulimit", "nofile=100000000"], "RF-POLICY", "limits.open_files"),
    (["--image", "nosuch", "--pull", "never"], "RF-IMAGE", "no image 'nosuch:latest'"),
    (["--image", "No:Such:Name"], "RF-IMAGE", "No:Such:Name"),
    (["--image", "../../etc"], "RF-IMAGE", "../../etc"),
    (["--rootfs", "/nosuch"], "RF-IMAGE", "'/nosuch'"),
    (["--rootfs", "/etc/hostname"], "RF-IMAGE", "Not a directory"),
    (["--cpuset-cpus", "4095"], "RF-UNENFORCEABLE", "CPU 4095 is not online"),
    (["--network", "egress"], "RF-UNENFORCEABLE", "network.mode"),
    (["--publish", "8080:80"], "RF-UNENFORCEABLE", "network.publish"),
    (["--security-opt", "seccomp=/nosuch.json"], "RF-POLICY", "/nosuch.json"),
    (["--device", "/dev/nosuch"], "RF-MOUNT", "'/dev/nosuch': No such file or directory"),
    (["-v", "/nosuch:/data"], "RF-MOUNT", "mount source '/nosuch': No such file or directory"),
    (["-v", "/:/data"], "RF-POLICY", "the whole host"),
    (["-v", "/proc/self:/data"], "RF-POLICY", "the kernel's process files"),
    (["-v", "/run:/data"], "RF-POLICY", "runtime sockets"),
    (["-v", "/var/lib/ringfence/images:/data"], "RF-MOUNT", "Ringfence's own"),
    (["-v", "/etc:/data"], "RF-MOUNT", "secrets of the host"),
    (["-v", "/dev/null:/data"], "RF-POLICY", "device nodes"),
    (["-v", "/usr/share:/proc/x"], "RF-POLICY", "a mount cannot cover /proc/x"),
    (["-v", "/usr/share:/"], "RF-POLICY", "a mount cannot cover /"),
]


@pytest.fixture(autouse=True)
def nothing_of_this_test_left(home: Path) -> Iterator[None]:
    """After each test no sandbox, id range or mount of it is there, at once and without a ``gc``."""
    yield
    assert remains(home) == []


def words_id(value: object) -> str | None:
    return " ".join(map(str, value)) if isinstance(value, list) else None


@pytest.mark.parametrize(("words", "status", "part"), NO_COMMAND, ids=words_id)
def test_a_command_that_cannot_be_executed(words: list[str], status: int, part: str) -> None:
    """127 for one that is not there, 126 for one that is but cannot be run, as docker and the shell do."""
    refused(run(*words), status, part, "[RF-COMMAND]")


@pytest.mark.parametrize(("words", "part"), BAD_OPTIONS, ids=words_id)
def test_a_command_line_that_makes_no_sense(words: list[str | bytes], part: str) -> None:
    """2, and the option by name."""
    refused(run(*words), 2, part, "[RF-USAGE]")


@pytest.mark.parametrize(("words", "code", "part"), BAD_VALUES, ids=words_id)
def test_a_value_that_cannot_be(words: list[str | bytes], code: str, part: str) -> None:
    """125, the field or the path, and a stable code."""
    refused(run(*words, "true"), 125, part, f"[{code}]")


def test_a_policy_that_is_not_yaml_is_placed(tmp_path: Path) -> None:
    """The line says which file, line and column."""
    policy = tmp_path / "broken.yaml"
    policy.write_text("limits:\n  memory: [\n")
    refused(run("--policy", policy, "true"), 125, f"{policy}:3:1: not YAML")


def test_a_policy_of_50_megabytes_is_not_read(tmp_path: Path) -> None:
    """It is refused for its size, before anything parses it."""
    policy = tmp_path / "big.yaml"
    with policy.open("wb") as file:
        file.write(b"seccomp: strict\n" * (50 << 16))
    refused(run("--policy", policy, "true"), 125, "larger than 1 MiB")


def test_policies_that_extend_each_other(tmp_path: Path) -> None:
    """The circle is written out, by file."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("extends: ./b.yaml\n")
    second.write_text("extends: ./a.yaml\n")
    refused(run("--policy", first, "true"), 125, "in a circle", str(first), str(second))


def test_memory_that_is_too_small_for_the_program() -> None:
    """The program is killed, and the message says that it was memory and whose limit."""
    done = run("--memory", "1m", "--", "python3", "-c", "x = bytearray(50 << 20)")
    refused(done, 137, "out of memory: limit of 1 MiB reached", "--memory")


def test_a_symbolic_link_out_of_its_directory_is_not_mounted(tmp_path: Path) -> None:
    """Whoever can write to a directory cannot have the rest of the host mounted; the way past is named."""
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret").write_text("secret")
    (inside / "data").symlink_to("../outside")
    refused(run("-v", f"{inside}/data:/data", "ls", "/data"), 125, "leads out", f"write {outside} itself")
    assert run("-v", f"{outside}:/data", "ls", "/data").stdout == b"secret\n"


@pytest.mark.parametrize(
    "name", ['quo"te', "apo'strophe", "back\\slash", "sp ace", "com,ma", "$(touch x)", "ünï"]
)
def test_odd_names_of_mounts_work_on_both_sides(tmp_path: Path, name: str) -> None:
    """A name is a name: nothing reads quotes, commas or dollars in it, and the proof finds the mount."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text("here")
    tmp_path.chmod(0o755)
    done = run("-v", f"{tmp_path}/{name}:/data/{name}", "cat", f"/data/{name}/file")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"here", b"")


@pytest.mark.parametrize("words", [["new\nline:/data"], [b"\xff:/data"], ["x:/da\nta"]], ids=repr)
def test_names_with_newlines_are_refused_in_one_line(tmp_path: Path, words: list[str | bytes]) -> None:
    """A newline in a path cannot forge a second line of output."""
    for name in (b"new\nline", b"\xff", b"x"):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    refused(run("-v", *words, "true", cwd=tmp_path), 125, "control character", "[RF-POLICY]")


HIDE = "for name in {names}; do for place in /usr/bin /usr/sbin /usr/local/bin /bin /sbin; do"
HIDE += ' if [ -e "$place/$name" ]; then mount --bind /dev/null "$place/$name"; fi; done; done'


def test_no_runtime_is_installed() -> None:
    """The line says what to install."""
    done = run("true", mounts=HIDE.format(names="crun runc"))
    refused(done, 125, "crun or runc is not installed", "apt-get install crun", "[RF-HOST]")


def test_the_chosen_runtime_is_not_installed() -> None:
    """A chosen runtime is never replaced by the other one."""
    done = run("--runtime", "crun", "true", mounts=HIDE.format(names="crun"))
    refused(done, 125, "crun is not installed")


@pytest.mark.requires("runc")
def test_without_crun_the_other_runtime_is_taken() -> None:
    """Unless one was chosen, the first that is there carries the plan out."""
    done = run("--json", "true", mounts=HIDE.format(names="crun"))
    assert done.returncode == 0
    assert b'"runtime": "runc version' in done.stdout


CGROUPS = "awk '$5 ~ \"^/sys/fs/cgroup\" {print $5}' /proc/self/mountinfo"


def test_a_read_only_cgroup_file_system() -> None:
    """Limits that cannot be set are a refusal that names them all, also when a plan was made before."""
    assert run("true").returncode == 0
    done = run("true", mounts=f"for place in $({CGROUPS}); do mount -o remount,bind,ro $place; done")
    refused(done, 125, "limits.memory cannot be enforced", "read-only", "limits.pids", "[RF-UNENFORCEABLE]")
    done = run("true", mounts="umount --lazy --recursive /sys/fs/cgroup")
    refused(done, 125, "no cgroup file system is mounted", "[RF-UNENFORCEABLE]")


NOBODY = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]


def test_a_user_without_a_home_or_ids() -> None:
    """Without a place for its files nothing starts; with one, the missing subordinate ids are the reason."""
    as_nobody = "set -- " + " ".join(NOBODY) + ' env -i PATH=/usr/bin:/bin {} "$@"; exec "$@"'
    refused(run("true", mounts=as_nobody.format("HOME=/nonexistent")), 125, "RINGFENCE_STATE_DIR")
    places = "mount -t tmpfs -o mode=1777 none /mnt; "
    own = "RINGFENCE_STATE_DIR=/mnt/state RINGFENCE_RUN_DIR=/mnt/run"
    done = run("--image", "host", "true", mounts=places + as_nobody.format(own))
    refused(done, 125, "/etc/subuid", "--allow-unenforced user", "[RF-UNENFORCEABLE]")


FULL = """
mount -t tmpfs -o size={size},nr_inodes={inodes},mode=711 none "$PLACE"
head -c {fill} /dev/zero > "$PLACE/fill"
status=0
"$@" || status=$?
find "$PLACE" -mindepth 3 >&2
exit $status
"""


@pytest.fixture
def place(home: Path) -> Iterator[Path]:
    directory = home / "full"
    directory.mkdir(mode=0o711)
    yield directory
    directory.rmdir()


@pytest.mark.parametrize("inodes", range(3, 14))
def test_a_full_run_directory_by_inodes(place: Path, inodes: int) -> None:
    """Whichever file is the first that cannot be made, the line says where there is no room."""
    script = FULL.format(size="1m", inodes=inodes, fill=0)
    done = run("true", mounts=script, env={"PLACE": str(place), "RINGFENCE_RUN_DIR": f"{place}/run"})
    if inodes > 11 and done.returncode == 0:
        return  # just enough: the last file is removed again before the next one is made
    refused(done, 125, f"{place}/run", "free some space there, or set RINGFENCE_RUN_DIR")


@pytest.mark.parametrize("left", [0, 4, 16, 28, 40])
def test_a_full_run_directory_by_bytes(place: Path, left: int) -> None:
    """The same for a disk with `left` KiB on it."""
    script = FULL.format(size="128k", inodes=0, fill=(128 - left) << 10)
    done = run("true", mounts=script, env={"PLACE": str(place), "RINGFENCE_RUN_DIR": f"{place}/run"})
    refused(done, 125, f"{place}/run", "free some space there, or set RINGFENCE_RUN_DIR")


def test_a_full_state_directory_is_only_a_lost_shortcut(place: Path) -> None:
    """Plans cannot be kept, which is no reason not to run."""
    script = (
        'mount -t tmpfs -o size=1m,mode=711 none "$PLACE"; mkdir -p "$PLACE/state/images"; chmod 711 "$PLACE/state"\n'
        'mount --bind /var/lib/ringfence/images "$PLACE/state/images"\n'
        'dd if=/dev/zero of="$PLACE/fill" 2> /dev/null || true\n'
    )
    accepted = [
        word for field in ("read", "read_iops") for word in ("--allow-unenforced", f"limits.io.{field}")
    ]
    env = {"PLACE": str(place), "RINGFENCE_STATE_DIR": f"{place}/state"}
    done = run(*accepted, "echo", "hi", mounts=script, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hi\n", b"")


def test_two_megabytes_of_arguments_arrive() -> None:
    """As much as the kernel takes for one process reaches the job, byte for byte."""
    words = ["x" * 100_000] * 19
    done = run("--", "python3", "-c", "import sys; print(sum(map(len, sys.argv[1:])))", *words)
    assert (done.returncode, done.stdout) == (0, b"1900000\n"), done.stderr[:300]


def test_more_arguments_than_the_sandbox_takes() -> None:
    """A quarter of the stack is the kernel's limit for arguments: beyond it the command is not executable."""
    done = run("--ulimit", "stack=1048576", "--", "true", *["x" * 100_000] * 4)
    refused(done, 126, "Argument list too long")


def test_arguments_and_environment_are_bytes(tmp_path: Path) -> None:
    """What is not UTF-8 reaches the job unchanged: arguments, variables and the working directory's name."""
    code = (
        "import os, sys; found = [*map(os.fsencode, sys.argv[1:]), os.environb[b'A'], os.environb[b'B']];"
        " os.write(1, b'|'.join(found))"
    )
    odd = b"\xff\xfe\n\"' $x"
    done = run("-e", b"A=" + odd, "-e", "B", "--", "python3", "-c", code, odd, env={"B": os.fsdecode(odd)})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"|".join([odd] * 3)


def test_the_proof_is_written_also_when_the_job_fails_and_not_when_nothing_ran(tmp_path: Path) -> None:
    """A proof that could not be taken leaves no file, not even an empty one."""
    proof = tmp_path / "proof.json"
    assert run("--proof", proof, "--", "sh", "-c", "exit 3").returncode == 3
    assert b'"holds": true' in proof.read_bytes()
    assert stat.S_IMODE(proof.stat().st_mode) == 0o644
    proof.unlink()
    refused(run("--proof", proof, "--workdir", "/nosuch", "--", "true"), 126, "working directory")
    assert list(tmp_path.iterdir()) == []


ACCEPTED = ("--allow-unenforced", "limits.io.write,limits.io.write_iops")


@pytest.mark.parametrize("trick", ["ln -s /victim/file $1", "echo forged > $1", ":"])
def test_the_proof_is_written_to_its_own_file_alone(tmp_path: Path, shared: Path, trick: str) -> None:
    """A job that can write where the proof goes cannot have it written elsewhere, nor put its own in its place."""
    (shared / "victim").write_text("precious")
    os.chown(shared, 0, 0)  # the job has the files of its owner, and the proof's is root
    script = f"set -- /data/proof.json.*; rm $1; {trick.replace('/victim/file', str(shared / 'victim'))}"
    words = ("-v", f"{shared}:/data:rw", *ACCEPTED, "--proof", shared / "proof.json")
    refused(run(*words, "--", "sh", "-c", script), 125, "somebody has taken its file away")
    assert (shared / "victim").read_text() == "precious"
    assert not os.path.lexists(shared / "proof.json")


def test_the_proof_replaces_no_device_and_leaves_nothing_after_a_refusal(tmp_path: Path) -> None:
    """What is there and is no file is refused; so is a name that is taken, and no empty file stays."""
    node, link = tmp_path / "node", tmp_path / "link"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    link.symlink_to(node)
    for path in (node, link, tmp_path, f"{tmp_path}/"):
        refused(run("--proof", path, "--", "true"), 2, "is no file")
    assert node.is_char_device()
    assert link.is_symlink()
    link.unlink()
    node.unlink()
    assert run("-d", "--name", "taken", "--", "true").returncode == 0
    try:
        refused(run("--proof", tmp_path / "a.json", "--name", "taken", "--", "true"), 125, "'taken'")
    finally:
        ringfence("rm", "--force", "taken")
    assert list(tmp_path.iterdir()) == []


def test_plan_refuses_as_run_does_and_touches_nothing(home: Path) -> None:
    """``ringfence plan`` with the same bad values says the same words."""
    for words in (["--memory", "4k"], ["-v", "/nosuch:/data"], ["--network", "egress"], ["--bogus"]):
        there, here = ringfence("plan", *words, "--", "true"), run(*words, "--", "true")
        assert there.returncode == here.returncode
        assert there.stderr.replace(b"plan --help", b"run --help") == here.stderr


ERRORS = Path(__file__).parents[2] / "docs/errors.md"


def documented() -> list[tuple[str, str]]:
    """Return (command line, what it says) of every example in docs/errors.md."""
    blocks = re.findall(r"^```\n(.*?)^```", ERRORS.read_text(), re.M | re.S)
    return re.findall(r"^\$ (ringfence .*)\n(ringfence: .*)$", "".join(blocks), re.M)


@pytest.mark.parametrize(("command", "line"), documented())
def test_the_documented_examples_say_what_they_say(command: str, line: str) -> None:
    """Each example of docs/errors.md, run as it stands there."""
    path = f"{os.path.dirname(RINGFENCE)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.stderr.decode() == f"{line}\n"


def test_every_code_is_documented() -> None:
    """docs/errors.md has a heading for each code that the source raises, and for no other."""
    source = Path(errors.__file__).parent
    used = {code for path in source.rglob("*.py") for code in re.findall(r"RF-[A-Z]+", path.read_text())}
    assert set(re.findall(r"^### (RF-[A-Z]+)$", ERRORS.read_text(), re.M)) == used
