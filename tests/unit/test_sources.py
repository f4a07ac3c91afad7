"""Mount sources on real trees: what they lead to, and what is refused unless the policy says so in so many words."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ringfence.errors import MountError
from ringfence.host.sources import Source, resolve_sources
from ringfence.policy.load import load
from ringfence.policy.model import Mount, Policy
from ringfence.policy.paths import RUNTIME_SOCKETS

replace = msgspec.structs.replace


def policy_of(*mounts: Mount, devices: tuple[str, ...] = ()) -> Policy:
    """A policy that nobody has checked: the lexical judgement of loading one must not be the only one."""
    policy = load("untrusted")
    return replace(policy, filesystem=replace(policy.filesystem, mounts=mounts), devices=devices)


def resolve(
    source: Path | str, *, mode: str = "ro", allow: bool = False, own: tuple[str, ...] = ()
) -> Source:
    mount = Mount(source=str(source), target="/data", mode=mode, allow_dangerous=allow)  # type: ignore[arg-type]
    (found,) = resolve_sources(policy_of(mount), own=own)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A real path, so that a symlink in pytest's own does not play a part."""
    return Path(os.path.realpath(tmp_path))


@pytest.fixture
def listener(tree: Path) -> Iterator[Path]:
    """A socket that somebody listens on."""
    path = tree / "some.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # a socket's path may be no longer than 107 bytes
        yield path


def test_files_and_directories_are_what_they_are(tree: Path) -> None:
    """Nothing is followed, nothing is read; the mode is the policy's."""
    (tree / "file").write_text("x")
    assert resolve(tree) == Source(str(tree), str(tree), "/data", "directory", True)
    assert resolve(tree / "file", mode="rw") == Source(f"{tree}/file", f"{tree}/file", "/data", "file", False)


def test_a_symbolic_link_that_stays_in_its_directory_is_followed(tree: Path) -> None:
    """`current -> release-2` shows nothing that its directory does not."""
    (tree / "release").mkdir()
    (tree / "release/file").write_text("x")
    (tree / "current").symlink_to("release")
    (tree / "again").symlink_to("current/file")
    assert resolve(tree / "current").source == f"{tree}/release"
    assert resolve(tree / "current/file").source == f"{tree}/release/file"
    assert resolve(tree / "again") == Source(f"{tree}/again", f"{tree}/release/file", "/data", "file", True)


@pytest.mark.parametrize("link", ["link", "deep/link", "link/below", "chain"])
def test_a_symbolic_link_out_of_its_directory_is_refused_and_named(tree: Path, link: str) -> None:
    """Whoever can write there could otherwise choose what of the host the next job sees."""
    (tree / "outside/below").mkdir(parents=True)
    home = tree / "home"
    (home / "deep").mkdir(parents=True)
    (home / "link").symlink_to("../outside")
    (home / "deep/link").symlink_to("../../outside")
    (home / "chain").symlink_to("link/below")
    with pytest.raises(MountError, match="leads out of its directory") as caught:
        resolve(home / link)
    real = os.path.realpath(home / link)
    assert caught.value.hint.endswith(f"write {real} itself")
    assert resolve(real).source == real
    assert resolve(home / link, allow=True).source == real


@pytest.mark.parametrize("name", ["missing", "file/below", "loop", "dangling", "nul\0"])
def test_a_source_that_leads_nowhere(tree: Path, name: str) -> None:
    """The line has the path as it was written."""
    (tree / "file").write_text("x")
    (tree / "loop").symlink_to("loop")
    (tree / "dangling").symlink_to("missing")
    with pytest.raises(MountError) as caught:
        resolve(f"{tree}/{name}", allow=True)
    assert repr(f"{tree}/{name}") in str(caught.value)
    assert "create it first" in str(caught.value)


def test_a_socket_is_refused_unless_allowed(listener: Path) -> None:
    """Its other end is outside: a job could ask it for anything."""
    with pytest.raises(MountError, match="a socket: whoever answers it is outside"):
        resolve(listener)
    assert resolve(listener, allow=True).kind == "socket"


def test_a_fifo_is_refused_unless_allowed(tree: Path) -> None:
    """The same, and opening one would block whoever opens it."""
    os.mkfifo(tree / "fifo")
    with pytest.raises(MountError, match="a FIFO"):
        resolve(tree / "fifo")
    assert resolve(tree / "fifo", allow=True).kind == "fifo"


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.skipif(os.geteuid() != 0, reason="mknod needs root")
def test_a_device_is_never_a_mount(tree: Path, allow: bool) -> None:
    """Mounts are nodev, so it would be of no use; there is a list for devices."""
    os.mknod(tree / "node", 0o600 | 0o020000, os.makedev(1, 3))
    with pytest.raises(MountError, match="is a device node") as caught:
        resolve(tree / "node", allow=allow)
    assert "--device" in caught.value.hint


@pytest.mark.parametrize("name", sorted(RUNTIME_SOCKETS))
def test_a_directory_that_holds_a_runtime_socket(tree: Path, name: str) -> None:
    """Wherever it has been put: who reaches it is root on the host."""
    (tree / name).touch()
    with pytest.raises(MountError, match=rf"the runtime socket {name}"):
        resolve(tree)
    assert resolve(tree, allow=True).kind == "directory"


@pytest.mark.parametrize(
    "source", ["/", "/proc", "/proc/self", "/sys", "/dev", "/run", "/etc", "/root", "/home", "/var"]
)
def test_dangerous_parents(source: str) -> None:
    """What gives the host away is refused, also under another name, unless the policy says so."""
    if not os.path.isdir(source):
        pytest.skip(f"no {source} here")
    with pytest.raises(MountError) as caught:
        resolve(source)
    assert repr(source) in str(caught.value)


@pytest.mark.parametrize("source", ["/", "/proc", "/run/systemd", "/etc"])
def test_a_link_to_a_dangerous_place_is_judged_by_where_it_leads(tree: Path, source: str) -> None:
    """Resolved first, then judged: neither a link nor a link to a link is a way round."""
    if not os.path.isdir(source):
        pytest.skip(f"no {source} here")
    (tree / "link").symlink_to(source)
    with pytest.raises(MountError):
        resolve(tree / "link")


def test_the_hosts_programs_may_be_shown_but_not_written_to() -> None:
    """Everybody can read /usr; writing to it is writing to the host."""
    assert resolve("/usr").read_only
    with pytest.raises(MountError, match="the host's own /usr, writable"):
        resolve("/usr", mode="rw")
    assert not resolve("/usr", mode="rw", allow=True).read_only


@pytest.mark.parametrize("allow", [False, True])
def test_our_own_directories_are_never_shown(tree: Path, allow: bool) -> None:
    """State and run directory, what is in them and what holds them: not even with the user's own words."""
    own = tree / "state/ringfence"
    (own / "images").mkdir(parents=True)
    (tree / "state-of-others").mkdir()
    for source in (own, own / "images", tree / "state", tree):
        with pytest.raises(MountError, match="Ringfence's own"):
            resolve(source, allow=allow, own=(str(own), "/nosuch"))
    assert resolve(tree / "state-of-others", own=(str(own), "/nosuch"))
    (tree / "link").symlink_to("state")
    with pytest.raises(MountError, match="Ringfence's own"):
        resolve(tree / "link", allow=allow, own=(str(own),))


def test_root_s_directories_are_not_shown_to_others(tree: Path) -> None:
    """A user's sandbox does not see those of root either, wherever its own state is."""
    with pytest.raises(MountError, match="/var/lib/ringfence"):
        resolve("/var/lib", allow=True, own=(str(tree),))


def test_devices_are_nodes_in_dev() -> None:
    """A device is named by the path at which the job sees it; anything else by that name is refused."""
    (found,) = resolve_sources(policy_of(devices=("/dev/null:rw",)), own=())
    assert found == Source("/dev/null", "/dev/null", "/dev/null", "device", False, "c 1:3 rw")
    (found,) = resolve_sources(policy_of(devices=("/dev/full:r",)), own=())
    assert found.rule == "c 1:7 r"
    with pytest.raises(MountError, match="'/dev/nosuch'"):
        resolve_sources(policy_of(devices=("/dev/nosuch:rw",)), own=())
    with pytest.raises(MountError, match="is not a device node in /dev"):
        resolve_sources(policy_of(devices=("/dev/shm:rw",)), own=())
