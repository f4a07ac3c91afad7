"""Attacks through system calls: each works outside, for an ordinary user or for root, and not in a sandbox."""

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from boxes import Sandboxes

pytestmark = pytest.mark.requires("root", "compiler", "x86_64")

EPERM, ENOSYS, EINVAL, EACCES = (
    str(number) for number in (errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EACCES)
)
KILLED = "killed 31"  # SIGSYS: no other entry into the kernel than the native one
NAMES = """
unshare_user unshare_mount unshare_net clone_user setns_own
mount_tmpfs mount_proc mount_bind remount_root unmount_proc new_mount_api clone_tree mount_attributes change_root
trace_me vm_read vm_write steal_descriptor compare_processes keyring key_add bpf_map user_faults io_ring counters
by_handle watch_everything kernel_log no_randomness set_clock load_module reboot_badly swap_on accounting host_name
real_time socket_alg socket_vsock socket_packet socket_rxrpc socket_xdp socket_raw netlink_audit
netlink_netfilter netlink_generic tiocsti tiocsti_high_bits tioclinux become_root become_neighbour become_group
join_groups all_capabilities make_disk make_memory chmod_suid chmod_sgid fchmodat2_suid create_suid mknod_suid
"""
INSIDE = dict.fromkeys(NAMES.split(), EPERM) | {
    "clone3_user": ENOSYS,  # its flags lie in memory, where no filter can read them: libc falls back to clone
    "become_host_id": EINVAL,  # an id that the sandbox's map does not have
    "negative_nice": EACCES,
    "int80": KILLED,
    "x32": KILLED,
}
# Here the kernel may lack the thing itself, or be asked so that even root does no harm: another answer will do.
HARMLESS = {
    "load_module",
    "reboot_badly",
    "swap_on",
    "accounting",
    "socket_alg",
    "socket_vsock",
    "socket_rxrpc",
    "socket_xdp",
    "tioclinux",
    "x32",
    "real_time",
}
SKIPPED = {"trace_target"}  # needs a target: test_agent_under_attack.py
Outside = Callable[..., "subprocess.CompletedProcess[bytes]"]


def outcomes(output: bytes) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in output.decode().splitlines())


@pytest.fixture(scope="module")
def inside(sandboxes: Sandboxes) -> dict[str, str]:
    result = sandboxes.run(["/probe/attack", *INSIDE])
    assert result.exit_status == 0, result.stderr
    return outcomes(result.stdout)


@pytest.fixture(scope="module")
def controls(probes: Path, outside: Outside) -> tuple[dict[str, str], dict[str, str]]:
    """What comes of each attack outside: for an ordinary user, and for root."""
    ordinary = outside([probes / "attack", *INSIDE])
    root = outside([probes / "attack", "--apart", *INSIDE], root=True)
    return outcomes(ordinary.stdout), outcomes(root.stdout)


def test_every_attack_of_the_probe_is_expected_to_fail(probes: Path, outside: Outside) -> None:
    """No attack that the probe knows is left out here."""
    assert set(outside([probes / "attack", "--list"]).stdout.decode().split()) == set(INSIDE) | SKIPPED


@pytest.mark.parametrize("name", INSIDE)
def test_attack_works_outside_and_fails_inside(
    name: str, inside: dict[str, str], controls: tuple[dict[str, str], dict[str, str]]
) -> None:
    """The kernel refuses it inside, in the way that we chose, and does it for the same program outside."""
    ordinary, root = controls[0][name], controls[1][name]
    if name in HARMLESS:
        assert root != INSIDE[name]
    else:
        assert "0" in (ordinary, root)
    assert inside[name] == INSIDE[name]


@pytest.mark.parametrize("name", INSIDE)
def test_root_of_the_sandbox_can_do_no_more(name: str, as_root: dict[str, str]) -> None:
    """`user: 0:0` is root by name only: without capabilities the same attacks fail, but for changing ids to itself."""
    allowed = {"become_root", "become_group"}  # from 0 to 0
    if name in allowed:
        assert as_root[name] == "0"
    else:
        assert as_root[name] == INSIDE[name]


@pytest.fixture(scope="module")
def as_root(sandboxes: Sandboxes) -> dict[str, str]:
    result = sandboxes.run(["/probe/attack", *INSIDE], {"user": "0:0"})
    assert result.exit_status == 0, result.stderr
    return outcomes(result.stdout)


def test_strict_stops_the_same_attacks(sandboxes: Sandboxes) -> None:
    """Under `seccomp: strict` no attack succeeds either."""
    names = [name for name in INSIDE if name not in ("int80", "x32")]
    result = sandboxes.run(["/probe/attack", *names], {"seccomp": "strict"})
    assert result.exit_status == 0, result.stderr
    found = outcomes(result.stdout)
    assert set(found) == set(names)
    assert [name for name, outcome in found.items() if outcome == "0"] == []
