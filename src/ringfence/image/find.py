"""From --image REF or --rootfs DIR to an `Image`. On the way of every `run`: imports only `os`."""

import os

from ringfence.errors import ImageError
from ringfence.image.model import Image
from ringfence.image.reference import canonical, encode, parse
from ringfence.linux import paths

DEFAULT = "base"


class ImageMissing(ImageError):
    """There is no image of that name here; it may be fetched."""


def find(ref: str | None, rootfs: str | None, *, state_dir: str) -> Image:
    """Return the image called `ref` (None: "base"), or that of the root directory `rootfs` of the user.

    Raises ImageMissing when there is none, ImageError when a name or directory cannot be one.
    """
    if rootfs is not None:
        if ref is not None:
            raise ImageError("--image and --rootfs both name the image", hint="give one of them")
        return _directory(rootfs, state_dir)
    if ref == "host":
        from ringfence.image.host import host_digest

        return Image("host", host_digest(), "host")
    reference = parse(DEFAULT if ref is None else ref)
    if reference.transport == "dir":
        return _directory(reference.path, state_dir)
    name = canonical(reference)
    for state in paths.image_states(state_dir):
        found = _in_store(state, name)
        if found is not None:
            return found
    if name == "base:latest":
        raise ImageError(
            "the image 'base' has not been built",
            hint="run: ringfence image bootstrap base, or use --image host",
        )
    raise ImageMissing(
        f"no image {name!r}", hint="'ringfence image ls' lists them; a directory is given with --rootfs"
    )


def images_dir(state: str) -> str:
    """Return the directory in the state directory `state` that holds the store of images."""
    return os.path.join(state, "images")


def _in_store(state: str, name: str) -> Image | None:
    """Look a canonical name up: its link in the store names the record, and with it the digest."""
    try:
        target = os.path.basename(os.readlink(f"{images_dir(state)}/refs/{encode(name)}"))
    except OSError:
        return None
    record = f"{images_dir(state)}/images/{target}"
    digest = target.removesuffix(".json").replace("sha256-", "sha256:", 1)
    digits = digest.removeprefix("sha256:")
    if len(digits) != 64 or digits.strip("0123456789abcdef") or not os.path.exists(record):
        return None
    return Image(name, digest, "store", record, state)


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
