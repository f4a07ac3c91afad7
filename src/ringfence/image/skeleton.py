"""The few files and empty directories that every image of ours has, whatever else is in it."""

MOUNT_POINTS = ("dev", "proc", "run", "sys", "tmp", "work")
SANDBOX_UID = 1000

_NOBODY = 65534
_USERS = (
    ("root", 0, "/root"),
    ("sandbox", SANDBOX_UID, "/work"),
    ("nobody", _NOBODY, "/nonexistent"),
)


def account_files() -> dict[str, bytes]:
    """Return etc/passwd and etc/group with only root, sandbox and nobody; there are no passwords to keep."""
    shells = {"sandbox": "/bin/sh"}
    passwd = [
        f"{name}:x:{uid}:{uid}::{home}:{shells.get(name, '/usr/sbin/nologin')}" for name, uid, home in _USERS
    ]
    group = [f"{'nogroup' if name == 'nobody' else name}:x:{uid}:" for name, uid, _ in _USERS]
    return {"etc/passwd": _lines(passwd), "etc/group": _lines(group)}


def name_files() -> dict[str, bytes]:
    """Return the files that resolve names: only localhost, no resolver, no host name."""
    return {
        "etc/hosts": _lines(["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]),
        "etc/hostname": b"",
        "etc/resolv.conf": b"",
        "etc/nsswitch.conf": _lines(["passwd: files", "group: files", "hosts: files dns", "networks: files"]),
    }


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
