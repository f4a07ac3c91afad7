"""Where Ringfence keeps its files: the state directory (images, logs) and the run directory (live sandboxes).

Both are created on first use, belong to the calling user and are writable by nobody else; anything found
otherwise is refused, because what lies in them is trusted. On the way of every `run`: imports only `os`.
"""

import os
import stat

from ringfence.errors import HostError

ROOT_STATE = "/var/lib/ringfence"
ROOT_RUN = "/run/ringfence"


def state_dir() -> str:
    """Return the state directory: $RINGFENCE_STATE_DIR, else the system's for root, else the user's own.

    Raises HostError when the path is relative or the directory is not safely the caller's own.
    """
    return _own_directory(_state_path(), "RINGFENCE_STATE_DIR")


def run_dir() -> str:
    """Return the run directory: $RINGFENCE_RUN_DIR, else the system's for root, else below $XDG_RUNTIME_DIR.

    It is empty after a reboot. Raises HostError like state_dir(), and when a user has no runtime directory.
    """
    return _own_directory(_run_path(), "RINGFENCE_RUN_DIR")


def image_states(state: str) -> tuple[str, ...]:
    """Return the state directories to look for images in: `state`, then root's for a user with default paths.

    A user may run root's images: they are world-readable and only root can change them.
    """
    if os.geteuid() == 0 or "RINGFENCE_STATE_DIR" in os.environ:
        return (state,)
    return (state, ROOT_STATE)


def _state_path() -> str:
    chosen = os.environ.get("RINGFENCE_STATE_DIR")
    if chosen:
        return chosen
    if os.geteuid() == 0:
        return ROOT_STATE
    home = os.environ.get("XDG_DATA_HOME") or os.path.join(_home(), ".local/share")
    return os.path.join(home, "ringfence")


def _run_path() -> str:
    chosen = os.environ.get("RINGFENCE_RUN_DIR")
    if chosen:
        return chosen
    if os.geteuid() == 0:
        return ROOT_RUN
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    if not os.path.isdir(runtime):
        raise HostError(
            f"user {os.geteuid()} has no runtime directory: {runtime} does not exist",
            hint="log in through systemd-logind (loginctl enable-linger), or set RINGFENCE_RUN_DIR",
        )
    return os.path.join(runtime, "ringfence")


def _home() -> str:
    home = os.environ.get("HOME")
    if not home:
        raise HostError("HOME is not set, so there is no place for state", hint="set RINGFENCE_STATE_DIR")
    return home


def _own_directory(path: str, variable: str) -> str:
    """Create `path` if need be, return its real path, and refuse it if others could change it."""
    if not path.startswith("/"):
        raise HostError(f"{path!r} is not an absolute path", hint=f"set {variable} to one")
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        found = _create(path, variable)
    except OSError as error:
        raise HostError(
            f"cannot use {path}: {error.strerror}", hint=f"set {variable} to another place"
        ) from error
    problem = _problem(found)
    if problem:
        raise HostError(f"{path} {problem}", hint=f"remove it, or set {variable} to another place")
    return os.path.realpath(path)


def _problem(found: os.stat_result) -> str:
    if not stat.S_ISDIR(found.st_mode):
        return "is not a directory"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to you ({os.geteuid()})"
    if found.st_mode & 0o022:
        return f"is writable by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def _create(path: str, variable: str) -> os.stat_result:
    # Root's directories are searchable: the users that sandboxes run as must reach their files below.
    mode = 0o711 if os.geteuid() == 0 else 0o700
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        try:
            os.mkdir(path, mode)
            os.chmod(path, mode)  # whatever the umask is
        except FileExistsError:  # another process was faster
            pass
        return os.lstat(path)
    except OSError as error:
        raise HostError(
            f"cannot create {path}: {error.strerror}", hint=f"set {variable} to another place"
        ) from error
