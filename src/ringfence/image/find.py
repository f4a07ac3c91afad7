"""From --image REF or --rootfs DIR to an `Image`. On the way of every `run`: imports only `os`."""

import os
import stat

from ringfence.errors import ImageError
from ringfence.image.model import Image
from ringfence.linux import paths

DEFAULT = "base"
CURRENT = "current"  # a symlink beside the builds of an image, to the build in use
_BUILD = "sha256-"


def find(ref: str | None, rootfs: str | None, *, state_dir: str) -> Image:
    """Return the image called `ref` (None: "base"), or that of the root directory `rootfs` of the user.

    Raises ImageError when there is none, it has not been built, or the directory cannot safely be a root.
    """
    if rootfs is not None:
        if ref is not None:
            raise ImageError("--image and --rootfs both name the image", hint="give one of them")
        return _directory(rootfs, state_dir)
    name = DEFAULT if ref is None else ref
    if name == "host":
        from ringfence.image.host import host_digest

        return Image("host", host_digest(), "host", "")
    if name == "base":
        for state in paths.image_states(state_dir):
            build = current_build(state, name)
            if build:
                root = os.path.join(images_dir(state), name, build, "rootfs")
                return Image(name, build.replace("-", ":", 1), "rootfs", root)
        raise ImageError(
            "the image 'base' has not been built",
            hint="run: ringfence image bootstrap base, or use --image host",
        )
    raise ImageError(
        f"no image {name!r}", hint="'ringfence image ls' lists them; a directory is given with --rootfs"
    )


def images_dir(state: str) -> str:
    """Return the directory in the state directory `state` that holds a directory for each built image."""
    return os.path.join(state, "images")


def current_build(state: str, name: str) -> str:
    """Return the name ("sha256-" and 64 digits) of the build of `name` in use, "" if there is none."""
    home = os.path.join(images_dir(state), name)
    try:
        build = os.readlink(os.path.join(home, CURRENT))
        whole = stat.S_ISDIR(os.lstat(os.path.join(home, build, "rootfs")).st_mode)
    except OSError:
        return ""
    digits = build.removeprefix(_BUILD)
    named = build.startswith(_BUILD) and len(digits) == 64 and not digits.strip("0123456789abcdef")
    return build if whole and named else ""


def _directory(given: str, state_dir: str) -> Image:
    """Return the image of the user's directory; its digest says which one it is, not what is in it."""
    if not given:  # realpath would take it for the working directory
        raise ImageError("cannot use '' as a root: it is empty", hint="--rootfs takes a directory")
    try:
        path = os.path.realpath(given, strict=True)
        # O_NOFOLLOW: realpath has resolved every symlink, so one found now was put there meanwhile.
        descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(
            f"cannot use {given!r} as a root: {reason}", hint="--rootfs takes a directory"
        ) from error
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    problem = _problem(path, state_dir)
    if problem:
        raise ImageError(
            f"cannot use {given!r} as a root: {problem}", hint="give a directory with only the image in it"
        )
    identity = f"rootfs:{found.st_dev:x}-{found.st_ino:x}-{found.st_mtime_ns:x}"
    return Image(given, identity, "rootfs", path)


def _problem(path: str, state_dir: str) -> str:
    """Say why the directory `path` would show a sandbox more than an image, "" if it does not."""
    if path == "/":
        return "it is the host's own root"
    for kernel in ("/proc", "/sys", "/dev"):
        if _inside(path, kernel):
            return f"{kernel} belongs to the kernel"
    for own in (state_dir, *_existing(paths.ROOT_STATE, paths.ROOT_RUN)):
        if _inside(own, path):
            return f"it holds Ringfence's own {own}"
        if _inside(path, own) and not _inside(path, images_dir(own)):
            return f"it lies in Ringfence's own {own}"
    return ""


def _existing(*directories: str) -> tuple[str, ...]:
    return tuple(directory for directory in directories if os.path.isdir(directory))


def _inside(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
