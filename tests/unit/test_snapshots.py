"""The store of saved machines, what a snapshot is good for, and the talk with QEMU that makes one."""

import copy
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import plan_inputs as given
import pytest

from ringfence.errors import HostError, SandboxError
from ringfence.plan.document import Machine, Plan
from ringfence.plan.make import make_plan
from ringfence.runtime.base import Instance
from ringfence.runtime.bridge import BOOT, LOAD, SAVE, arguments
from ringfence.runtime.microvm import saving, snapshots
from ringfence.runtime.microvm.qmp import Monitor
from ringfence.sandbox import launch
from ringfence.sandbox.template import Patience

NAME = "0" * 40
STATE = b"a saved machine" * 1000


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """A plan for a machine with its image alone, all of whose files are there."""
    made = make_plan(given.policy(isolation="microvm"), given.MACHINE, given.ROOT_V1_QEMU)
    for op in made["stage"]:
        if op["op"] == "bind":
            op["source"] = _file(tmp_path, op["source"])
    machine = _machine(made)
    machine["disks"][0] = {**machine["disks"][0], "source": _file(tmp_path, "disk"), "kind": "image"}
    return made


def _file(home: Path, name: str) -> str:
    path = home / name.replace("/", "_")
    path.write_text(name)
    return str(path)


def _machine(plan: Plan) -> Machine:
    machine = plan["machine"]
    assert machine is not None
    return machine


def _key(plan: Plan) -> str:
    return snapshots.key(plan, _machine(plan))


# What a snapshot is good for


def test_only_a_machine_of_root_with_its_image_alone_can_be_saved(plan: Plan) -> None:
    """Not with a mount, nor a directory as its image, nor without root, nor with another VMM, nor without a machine."""
    assert snapshots.possible(plan)
    machine = _machine(plan)
    disk = machine["disks"][0]
    others: list[object] = [
        {**plan, "rootless": True},
        {**plan, "machine": None},
        {**plan, "machine": {**machine, "vmm": "firecracker"}},
        {**plan, "machine": {**machine, "disks": [{**disk, "kind": "directory"}]}},
        {**plan, "machine": {**machine, "disks": [disk, {**disk, "device": "vdb", "kind": "directory"}]}},
    ]
    assert [snapshots.possible(other) for other in others] == [False] * len(others)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"argv": ["qemu", "-m", "1G"]},
        {"version": "QEMU emulator version 9.9"},
        {"kernel_digest": "sha256:another"},
        {"accelerator": "tcg"},
    ],
)
def test_another_machine_has_another_key(plan: Plan, change: dict[str, object]) -> None:
    """Command line, version, kernel: a guest booted with another one is another guest."""
    assert _machine(plan)["accelerator"] == "kvm"
    other: Plan = {**plan, "machine": {**_machine(plan), **change}}  # type: ignore[typeddict-item]
    assert _key(plan) == _key(copy.deepcopy(plan))
    assert _key(other) != _key(plan)


@pytest.mark.parametrize("which", ["stage", "disk"])
def test_a_changed_file_gives_another_key(plan: Plan, which: str) -> None:
    """QEMU and its libraries, and the image's disk, are known by what their inodes say."""
    before = _key(plan)
    files = [op["source"] for op in plan["stage"] if op["op"] == "bind"]
    path = Path(files[0] if which == "stage" else _machine(plan)["disks"][0]["source"])
    path.write_text("another content")
    assert _key(plan) != before


def test_what_a_guest_is_told_after_its_boot_is_not_in_the_key(plan: Plan) -> None:
    """User, filter, limits of the job and its environment come with the setup text: one snapshot serves them all."""
    other: Plan = {**plan, "env": ["A=1"], "cwd": "/tmp"}
    other["machine"] = {**_machine(plan), "setup": ["uid=7"]}
    assert _key(other) == _key(plan)


# The command line


def _arguments(plan: Plan, snapshot: str) -> list[str]:
    instance = Instance(
        id="a", directory="/run/a", staging="/run/s", base=0, cgroup_path="", snapshot=snapshot
    )
    return arguments(plan, _machine(plan), instance)


def test_a_machine_to_be_restored_differs_by_its_state_alone(plan: Plan) -> None:
    """The descriptor behind the disks; QEMU wants all else as it was, and the bridge waits for HELLO as ever."""
    boots, restored = _arguments(plan, BOOT), _arguments(plan, LOAD)
    assert (boots[4:6], restored[4:6]) == (["1", "1"], ["1", "2"])
    assert restored[6:] == [*boots[6:], "-incoming", "fd:9"]


def test_a_machine_to_be_saved_has_nobody_at_its_link(plan: Plan) -> None:
    """Its monitor is the descriptor behind the disks, it waits to be started, and its devices are the same."""
    boots, saved = _arguments(plan, BOOT)[6:], _arguments(plan, SAVE)[6:]
    assert saved[len(boots) :] == [
        *("-chardev", "socket,id=monitor,fd=9", "-mon", "chardev=monitor,mode=control", "-S")
    ]
    differ = [pair for pair in zip(boots, saved, strict=False) if pair[0] != pair[1]]
    assert differ == [("virtserialport,chardev=link,name=link", "virtserialport,id=link,name=link")]


# The store


def _published(home: Path, machine: Machine, name: str = NAME) -> None:
    with saving.making(str(home), name) as made:
        assert made is not None
        os.write(made.descriptor, STATE)
        saving.publish(str(home), name, made, machine, "base:latest")


def _refused(home: Path, machine: Machine, *parts: str) -> None:
    with pytest.raises(HostError) as caught:
        snapshots.load(str(home), NAME, machine)
    assert caught.value.exit_status == 125
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert snapshots.load(str(home), NAME, machine) == -1, (
        "it is gone, so that the next run makes another one"
    )
    assert list((home / "snapshots").glob(f"{NAME}*")) == []


def test_what_was_published_is_loaded_from_its_beginning_and_read_only(plan: Plan, tmp_path: Path) -> None:
    """Nobody but its owner can open the file, and whoever gets the descriptor cannot write with it."""
    machine = _machine(plan)
    assert snapshots.load(str(tmp_path), NAME, machine) == -1
    _published(tmp_path, machine)
    descriptor = snapshots.load(str(tmp_path), NAME, machine)
    try:
        assert os.read(descriptor, len(STATE) + 1) == STATE
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(descriptor, b"x")
    finally:
        os.close(descriptor)
    home = tmp_path / "snapshots"
    assert home.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in home.iterdir()} == {
        "lock": 0o600,
        f"{NAME}.record": 0o600,
        f"{NAME}.state": 0o600,
    }


def _truncate(path: Path) -> None:
    os.truncate(path, 100)


def _change(path: Path) -> None:
    """Change a byte, and set the times back."""
    found = path.stat()
    with open(path, "r+b") as file:
        file.write(b"A")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _replace(path: Path) -> None:
    """Put another file of the same content in its place."""
    copied = path.with_name("copy")
    copied.write_bytes(path.read_bytes())
    copied.rename(path)


def _lead_elsewhere(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_truncate, "100 bytes instead of"),
        (_change, "was changed"),
        (_replace, "was changed"),
        (_lead_elsewhere, "cannot be opened"),
    ],
)
def test_a_changed_file_is_refused_once_and_removed(
    plan: Plan, tmp_path: Path, damage: Callable[[Path], None], word: str
) -> None:
    """Truncated, written to, replaced or led elsewhere: one line, and the next run does not find it."""
    _published(tmp_path, _machine(plan))
    damage(tmp_path / "snapshots" / f"{NAME}.state")
    _refused(tmp_path, _machine(plan), NAME, word, "--no-snapshot")


def test_a_snapshot_of_another_version_is_refused(plan: Plan, tmp_path: Path) -> None:
    """Nobody restores what another QEMU wrote, whatever its file is called."""
    machine = _machine(plan)
    _published(tmp_path, {**machine, "version": "QEMU emulator version 9.9"})
    _refused(tmp_path, machine, "another version", "9.9", "7.2.22")


def test_a_disk_that_takes_nothing_is_no_reason_not_to_restore(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be noted down, because the record is just being removed, is left."""
    _published(tmp_path, _machine(plan))
    record = tmp_path / "snapshots" / f"{NAME}.record"
    look = snapshots.file_facts

    def removed_meanwhile(descriptor: int) -> dict[str, str]:
        record.unlink()
        return look(descriptor)

    monkeypatch.setattr(snapshots, "file_facts", removed_meanwhile)
    descriptor = snapshots.load(str(tmp_path), NAME, _machine(plan))
    assert descriptor >= 0
    os.close(descriptor)


@pytest.mark.parametrize("text", ["", "\0\xff\n\n nonsense", "format 1\n"])
def test_what_is_no_record_is_refused(plan: Plan, tmp_path: Path, text: str) -> None:
    """A record that says too little is not taken for one that says all is well."""
    _published(tmp_path, _machine(plan))
    record = tmp_path / "snapshots" / f"{NAME}.record"
    record.write_text(text, encoding="latin-1")
    _refused(tmp_path, _machine(plan), NAME)


def test_after_a_boot_the_content_is_looked_at(plan: Plan, tmp_path: Path) -> None:
    """What changed beneath the file system while the host was off shows in the digest; else it is believed again."""
    machine, home = _machine(plan), str(tmp_path)
    _published(tmp_path, machine)
    record = snapshots.read_record(home, NAME) or {}
    snapshots.write_record(home, NAME, {**record, "boot": "the one before"})
    os.close(snapshots.load(home, NAME, machine))
    assert snapshots.read_record(home, NAME) == record, "it was looked at in this boot"
    state = tmp_path / "snapshots" / f"{NAME}.state"
    _change(state)
    descriptor = os.open(state, os.O_RDONLY)
    facts = snapshots.file_facts(descriptor)
    os.close(descriptor)
    snapshots.write_record(home, NAME, {**record, **facts, "boot": "the one before"})
    _refused(tmp_path, machine, "another digest")


def test_an_unpublished_file_is_gone(tmp_path: Path) -> None:
    """Whatever ends the making, nothing is left of it but the lock, and rests of killed ones go with the next."""
    with pytest.raises(KeyboardInterrupt), saving.making(str(tmp_path), NAME) as made:
        assert made is not None
        (tmp_path / "snapshots" / "of-a-killed-one.new").touch()
        raise KeyboardInterrupt
    with saving.making(str(tmp_path), NAME) as made:
        assert sorted(os.listdir(tmp_path / "snapshots")) == [f"{NAME}.new", "lock"]
    assert os.listdir(tmp_path / "snapshots") == ["lock"]


def test_nobody_waits_for_another_maker(tmp_path: Path) -> None:
    """The second one is told so at once: it can boot meanwhile."""
    with saving.making(str(tmp_path), NAME) as first:
        assert first is not None
        with saving.making(str(tmp_path), NAME) as second:
            assert second is None


def test_after_a_failure_nobody_tries_for_an_hour(tmp_path: Path) -> None:
    """A machine that cannot be saved must not cost every run the attempt."""
    with saving.making(str(tmp_path), NAME) as made:
        assert made is not None
    saving.note_failure(str(tmp_path), NAME, "no reason")
    with saving.making(str(tmp_path), NAME) as made:
        assert made is None
    an_hour_ago = time.time() - 3601
    os.utime(tmp_path / "snapshots" / f"{NAME}.failed", (an_hour_ago, an_hour_ago))
    with saving.making(str(tmp_path), NAME) as made:
        assert made is not None


def test_only_the_eight_last_used_are_kept(plan: Plan, tmp_path: Path) -> None:
    """A new one takes the place of the one not used for the longest time."""
    machine = _machine(plan)
    names = [f"{number:040}" for number in range(9)]
    for number, name in enumerate(names[:8]):
        _published(tmp_path, machine, name)
        then = time.time() - 1000 + number
        os.utime(tmp_path / "snapshots" / f"{name}.record", (then, then))
    os.close(snapshots.load(str(tmp_path), names[0], machine))  # used just now
    _published(tmp_path, machine, names[8])
    left = {path.stem for path in (tmp_path / "snapshots").glob("*.state")}
    assert left == {*names} - {names[1]}


def test_gc_removes_what_nobody_used_for_a_month_and_all_rests(plan: Plan, tmp_path: Path) -> None:
    """Files without a record, notes of failures, half-made ones, old ones; not what is in use."""
    assert saving.collect(str(tmp_path)) == []
    machine, home = _machine(plan), tmp_path / "snapshots"
    old = "1" * 40
    for name in (NAME, old):
        _published(tmp_path, machine, name)
    then = time.time() - 31 * 86400
    os.utime(home / f"{old}.record", (then, then))
    for rest in (f"{'2' * 40}.state", f"{'2' * 40}.new", f"{'2' * 40}.failed", ".temporary"):
        (home / rest).touch()
    assert len(saving.collect(str(tmp_path))) == 5
    assert sorted(os.listdir(home)) == [f"{NAME}.record", f"{NAME}.state", "lock"]


# What a machine that is being saved says


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_who_gives_up_is_not_kept_waiting(ends: tuple[socket.socket, socket.socket]) -> None:
    """A signal ends the waiting, whatever the machine does."""
    reader, writer = os.pipe()
    try:
        os.write(writer, b"x")
        with pytest.raises(launch.Interrupted):
            Patience(reader, lambda: True).wait(ends[0])
    finally:
        os.close(reader)
        os.close(writer)


def _monitor(ours: socket.socket) -> Monitor:
    return Monitor(ours, Patience(-1, lambda: False).wait)


def _say(sock: socket.socket, *messages: object) -> None:
    sock.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


GREETING: dict[str, object] = {"QMP": {"version": {}, "capabilities": []}}
DONE: dict[str, object] = {"return": {}}


def test_booting_waits_until_the_guest_has_opened_its_link(ends: tuple[socket.socket, socket.socket]) -> None:
    """The event counts whenever it comes; that of another port, or of one that was closed, does not."""
    ours, theirs = ends

    def change(port: str, opened: object) -> dict[str, object]:
        return {"event": "VSERPORT_CHANGE", "data": {"id": port, "open": opened}}

    _say(theirs, GREETING, DONE, change("other", True), change("link", False), DONE)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(SandboxError, match="ended before"):
        _monitor(ours).boot("link")


def test_an_event_before_the_answer_counts(ends: tuple[socket.socket, socket.socket]) -> None:
    """A guest may be quicker than QEMU's answer."""
    ours, theirs = ends
    _say(theirs, GREETING, DONE, {"event": "VSERPORT_CHANGE", "data": {"id": "link", "open": True}}, DONE)
    _monitor(ours).boot("link")


def _event(status: str) -> dict[str, object]:
    return {"event": "MIGRATION", "data": {"status": status}}


def test_saving_passes_the_descriptor_and_waits_for_the_end(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path
) -> None:
    """The machine is not stopped first, QEMU gets the file itself, and nothing is believed before "completed"."""
    ours, theirs = ends
    _say(theirs, GREETING, *[DONE] * 5, {"event": "STOP"}, _event("active"))
    asked: list[str] = []
    released = threading.Event()

    def qemu() -> None:
        data = b""
        while b'"migrate"' not in data:
            piece, descriptors, _, _ = socket.recv_fds(theirs, 4096, 1)
            data += piece
            for descriptor in descriptors:
                os.write(descriptor, STATE)
                os.close(descriptor)
        asked.extend(json.loads(line)["execute"] for line in data.splitlines())
        released.set()
        _say(theirs, _event("completed"))

    thread = threading.Thread(target=qemu)
    thread.start()
    try:
        with open(tmp_path / "state", "wb") as file:
            _monitor(ours).save(file.fileno())
        assert released.is_set()
    finally:
        thread.join(10)
    assert (tmp_path / "state").read_bytes() == STATE
    assert asked == [
        "qmp_capabilities",
        "migrate-set-capabilities",
        "migrate-set-parameters",
        "getfd",
        "migrate",
    ]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"hello\r\n",
        b"[1]\r\n",
        b'{"return": {}}\r\n',
        b"[" * 60000 + b"\r\n",
        b"x" * 200000,
        json.dumps(GREETING).encode() + b'\r\n{"error": {"class": "GenericError", "desc": "no"}}\r\n',
        json.dumps(GREETING).encode() + b'\r\n{"event": "STOP"}\r\n' * 100,
    ],
    ids=["nothing", "text", "list", "no greeting", "depth", "length", "error", "events"],
)
def test_a_monitor_that_is_none_is_an_error(ends: tuple[socket.socket, socket.socket], said: bytes) -> None:
    """QEMU may be in a guest's hands: what it says is bounded in length, depth and number."""
    ours, theirs = ends
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    theirs.sendall(said)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(SandboxError):
        _monitor(ours)


@pytest.mark.parametrize("status", ["failed", "cancelled"])
def test_a_failed_migration_is_an_error(
    ends: tuple[socket.socket, socket.socket], tmp_path: Path, status: str
) -> None:
    """What was not written to its end is no snapshot."""
    ours, theirs = ends
    _say(theirs, GREETING, *[DONE] * 5, _event("active"), _event(status))
    with open(tmp_path / "state", "wb") as file, pytest.raises(SandboxError, match=status):
        _monitor(ours).save(file.fileno())
