"""Brings images into the store: from registries and from what other tools have written.

The manifest is asked for first: it says whether the image is here already, and which one it is. skopeo then copies
it. Where the registry has Docker's older manifest skopeo writes an OCI one in its stead, under another digest; so
the original and its configuration are fetched too, and the image keeps the digest that its registry, `docker pull`
and `podman pull` know it by. Under a policy that asks for signatures the image is what skopeo has checked and
written, and nothing that was asked for beside it.
"""

import fcntl
import os
import time
from contextlib import contextmanager

from ringfence.errors import ImageError
from ringfence.image import rules, store
from ringfence.image.complaints import CutOff
from ringfence.image.manifest import find_manifest, host_platform, parse_platform
from ringfence.image.publish import BrokenBlob, add_blob, publish
from ringfence.image.reference import canonical, encode, source
from ringfence.image.skopeo import Skopeo, accepts_anything, is_loopback, sha256
from ringfence.image.trees import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ringfence.image.manifest import Manifest
    from ringfence.image.record import ImageRecord, Platform
    from ringfence.image.reference import Reference
    from ringfence.image.rules import Rules

    Say = Callable[[str], None]
    Progress = Callable[[int, int], None]  # bytes here, bytes in all (0: not known)

_TRIES = 3
_PLACE = ".pull-"
_OURS = ("base:latest", "host:latest")  # names that a registry must never fill
_NO_RULES = rules.NoRules()


def ensure(
    state: str,
    reference: "Reference",
    *,
    how: str = "missing",
    rules_of: "Rules" = _NO_RULES,
    platform: str = "",
    say: "Say" = lambda _: None,
    progress: "Progress" = lambda _done, _all: None,
) -> str:
    """Have the image in the store under its canonical name, and return that name.

    `how` is "always" (ask its registry first), "missing" (only when it is not here) or "never". Raises ImageError.
    """
    name = canonical(reference)
    digest = store.resolve(state, name)
    if digest is not None and (how != "always" or name in _OURS):
        record = store.read_record(state, digest)
        local = not rules.came_from_registry(store.images_dir(state), name, digest)
        rules.check(rules_of, reference, shown=name, local=local)
        problem = _problem(state, record, name, rules_of=rules_of, platform=platform)
        if not problem:
            return name
        # A name that was given on this host is not for a registry to fill: anybody could have taken it there.
        if how == "never" or (local and reference.transport == "docker"):
            raise ImageError(f"the image {name!r} {problem}", hint="'ringfence image ls' lists what is here")
    elif how == "never":
        raise ImageError(
            f"the image {name!r} is not here",
            hint="'ringfence image ls' lists what is; --pull missing fetches it",
        )
    always = how == "always"
    pull(
        state,
        reference,
        rules_of=rules_of,
        platform=platform,
        always=always,
        say=say,
        progress=progress,
    )
    return name


def _problem(state: str, record: "ImageRecord", name: str, *, rules_of: "Rules", platform: str) -> str:
    """Say why an image that is here will not do, "" if it will."""
    if not _fits(record, platform):
        return f"is here for {record.platform}, not for {platform}"
    if not rules.passed(store.images_dir(state), rules_of, name, record.digest):
        return f"was not fetched under the policy for signatures {rules_of.signatures}"
    return ""


def pull(
    state: str,
    reference: "Reference",
    *,
    name: str = "",
    rules_of: "Rules" = _NO_RULES,
    platform: str = "",
    always: bool = True,
    say: "Say" = lambda _: None,
    progress: "Progress" = lambda _done, _all: None,
) -> "ImageRecord":
    """Bring the image here, call it `name` ("": its canonical name), and return its record.

    With `always` its registry is asked even when it is here; what has not changed is not fetched again. Several at
    once do the work once. A connection that is cut is tried again, and what has come stays. Raises ImageError.
    """
    if reference.transport == "dir":
        raise ImageError(
            f"dir:{reference.path} is a directory, nothing to pull",
            hint=f"run --rootfs {reference.path}, or ringfence image import {reference.path} NAME",
        )
    name = name or canonical(reference)
    rules.check(rules_of, reference, shown=name)
    if rules_of.signatures:
        rules.files(rules_of.signatures)  # says what is wrong with them better than skopeo does
    if canonical(reference) in _OURS:
        raise ImageError(
            f"{name!r} is made on this host, not pulled", hint="run: ringfence image bootstrap base"
        )
    wanted = parse_platform(platform) if platform else host_platform()
    work = _Pull(state, reference, name, rules_of=rules_of, wanted=wanted, say=say, progress=progress)
    waiting = f"waiting for another pull of {name}"
    with store.named(state, encode(name), lambda: say(waiting)), store.working(state):
        digest = None if always else store.resolve(state, name)
        if digest is not None:  # another pull has just brought it
            record = store.read_record(state, digest)
            if not _problem(state, record, name, rules_of=rules_of, platform=platform):
                return record
        return work.tried()


def _fits(record: "ImageRecord", platform: str) -> bool:
    """Say whether the record is of the platform that was asked for, if one was."""
    if not platform:
        return True
    wanted, found = parse_platform(platform), record.platform
    return (wanted.os, wanted.architecture) == (found.os, found.architecture) and (
        not wanted.variant or wanted.variant == found.variant
    )


class _Pull:
    """One image on its way; the caller holds the lock of its name and is inside `store.working`."""

    def __init__(
        self,
        state: str,
        reference: "Reference",
        name: str,
        *,
        rules_of: "Rules",
        wanted: "Platform",
        say: "Say",
        progress: "Progress",
    ) -> None:
        self._state = state
        self._reference = reference
        self._name = name
        self._rules = rules_of
        self._wanted = wanted
        self._say = say
        self._progress = progress

    def tried(self) -> "ImageRecord":
        """Bring it, with another try when the connection was cut or a blob of the store was damaged."""
        for attempt in range(1, _TRIES):
            try:
                return self._brought()
            except (CutOff, BrokenBlob) as error:
                self._say(f"{error.message}: trying again, {attempt + 1} of {_TRIES}")
                time.sleep(attempt - 1)
        return self._brought()

    def _brought(self) -> "ImageRecord":
        try:
            with _workplace(self._state) as place:
                skopeo = Skopeo(
                    place,
                    platform=str(self._wanted),
                    signatures=self._rules.signatures or "",
                    plain=is_loopback(self._reference.registry),
                )
                if self._reference.transport == "docker":
                    record = self._from_registry(skopeo)
                else:
                    record = self._published(self._copy(skopeo, source(self._reference), {}))
            images, registry = store.images_dir(self._state), self._reference.transport == "docker"
            rules.remember(images, self._rules, self._name, record.digest, registry=registry)
            return record
        except OSError as error:
            raise store.cannot("write to", error.filename or store.images_dir(self._state), error) from error

    def _from_registry(self, skopeo: Skopeo) -> "ImageRecord":
        documents: dict[str, bytes] = {}

        def read(digest: str) -> bytes:
            if digest not in documents:
                documents[digest] = _checked(skopeo.manifest(self._pinned(digest)), digest)
            return documents[digest]

        self._say(f"asking for {self._name}")
        asked = source(self._reference)
        top = skopeo.manifest(asked)
        documents[self._reference.digest or sha256(top)] = _checked(top, self._reference.digest)
        manifest = find_manifest(read, next(iter(documents)), self._wanted)
        strict = not accepts_anything(skopeo.policy)
        if not strict and store.resolve(self._state, manifest.digest) is not None:
            try:
                return self._published(manifest.digest)
            except BrokenBlob:
                self._say("the store has lost a part of it")
        # The tag itself under a policy for signatures, which may be about tags; else what was just looked at.
        copied = self._copy(skopeo, asked if strict else self._pinned(manifest.digest), _sizes(manifest))
        if not strict and copied != manifest.digest:
            config = skopeo.configuration(self._pinned(manifest.digest))
            add_blob(self._state, _checked(config, manifest.config.digest))
            copied = add_blob(self._state, documents[manifest.digest])
        return self._published(copied)

    def _pinned(self, digest: str) -> str:
        return f"docker://{self._reference.name}@{digest}"

    def _copy(self, skopeo: Skopeo, asked: str, sizes: dict[str, int]) -> str:
        blobs = store.images_dir(self._state, "blobs")
        missing = {
            digest: size
            for digest, size in sizes.items()
            if not os.path.exists(store.blob_path(self._state, digest))
        }
        total = sum(missing.values())
        _check_space(blobs, total)

        def watch() -> int:
            done = sum(_size(store.blob_path(self._state, digest)) for digest in missing)
            coming = _tree_size(skopeo.place)
            self._progress(min(done + coming, total), total)
            return done + coming

        self._say(f"fetching {self._name}" + (f", {total / 1e6:.1f} MB" if total else ""))
        return skopeo.copy(asked, blobs, watch)

    def _published(self, digest: str) -> "ImageRecord":
        wanted = "" if self._wanted == host_platform() else str(self._wanted)
        return publish(
            self._state,
            self._name,
            digest,
            source=source(self._reference),
            platform=wanted,
            shared=False,
            say=self._say,
        )


def _checked(data: bytes, digest: str) -> bytes:
    """Return `data` if its digest is this one, or "" is asked; raises CutOff, for it may have been cut short."""
    if digest and sha256(data) != digest:
        raise CutOff(f"what came as {digest} is {sha256(data)}", hint="have the image pushed again")
    return data


def _sizes(manifest: "Manifest") -> dict[str, int]:
    return {blob.digest: blob.size for blob in (*manifest.layers, manifest.config)}


def _check_space(directory: str, needed_bytes: int) -> None:
    found = os.statvfs(directory)
    free_bytes = found.f_bavail * found.f_frsize
    if needed_bytes > free_bytes:
        raise ImageError(
            f"the image needs {needed_bytes >> 20} MiB, {directory} has {free_bytes >> 20} MiB left",
            hint="free some space, or run: ringfence image prune",
        )


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _tree_size(directory: str) -> int:
    """Return the bytes of the files below a directory in which others are at work."""
    total = 0
    try:
        with os.scandir(directory) as found:
            for item in found:
                total += _tree_size(item.path) if item.is_dir(follow_symlinks=False) else _size(item.path)
    except OSError:  # gone meanwhile
        pass
    return total


@contextmanager
def _workplace(state: str) -> "Iterator[str]":
    """A directory in the store for what is on its way; the lock on it says that somebody is at work."""
    path = store.images_dir(state, f"{_PLACE}{os.getpid()}-{os.urandom(4).hex()}")
    with store.locked(state):
        _sweep(state)
        os.mkdir(path, 0o700)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        remove_tree(path)
        os.close(descriptor)


def _sweep(state: str) -> None:
    """Remove what killed pulls left; the caller holds the lock of the store. Raises OSError."""
    home = store.images_dir(state)
    for path in [os.path.join(home, entry) for entry in os.listdir(home) if entry.startswith(_PLACE)]:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # whoever was at work there has done
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_tree(path)
        except BlockingIOError:  # somebody is at work there
            continue
        finally:
            os.close(descriptor)
