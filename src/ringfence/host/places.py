"""Where the runtimes are looked for. On the way of every run: imports only `os`."""

import os

NAMES = ("crun", "runc", "runsc", "qemu-system-x86_64", "firecracker")
# Debian puts runc into /usr/sbin, which is not on the PATH of an ordinary user.
_ALWAYS = ("/usr/sbin", "/sbin", "/usr/local/bin")


def find(name: str) -> str:
    """Return the absolute path of program `name` on PATH or in the system's places, "" when there is none."""
    # Relative entries of PATH are passed over: the working directory may belong to the workload.
    places = [place for place in os.environ.get("PATH", "/usr/bin:/bin").split(":") if place.startswith("/")]
    for place in (*places, *_ALWAYS):
        path = f"{place}/{name}"
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return ""
