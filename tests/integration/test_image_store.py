"""The store of images: imports, names, removal, verification, and what is left when work is killed."""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import RINGFENCE, refused, ringfence
from imagetrees import TIME_NS, contents, empty, files_of, make_tree, quick_place, settle
from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.compare import differences
from ringfence.image.hold import hold, take_away
from ringfence.image.importing import import_directory, import_tar
from ringfence.image.publish import BrokenBlob, publish
from ringfence.image.removal import prune, remove
from ringfence.image.verifying import verify

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def state() -> Iterator[Path]:
    with quick_place() as place:
        (place / "state").mkdir(mode=0o711)
        yield place / "state"


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with quick_place() as place:
        yield make_tree(place / "root")


@pytest.fixture
def image(state: Path, tree: Path) -> str:
    return import_directory(str(state), str(tree), "mine:1").digest


def command(state: Path, *words: str | Path, **more: object) -> "subprocess.CompletedProcess[bytes]":
    return ringfence("image", *words, env={"RINGFENCE_STATE_DIR": str(state)}, **more)  # type: ignore[arg-type]


def test_a_directory_becomes_the_same_files(state: Path, tree: Path, image: str) -> None:
    """Names, owners, modes, times, links, attributes and content arrive; only the set-uid bit does not."""
    lines = list(differences(str(files_of(state, image)[0]), str(tree)))
    assert lines == ["/usr/bin/set-uid: mode 0755 instead of 4755"]


def test_the_same_directory_is_the_same_image(state: Path, tmp_path: Path, image: str) -> None:
    """A copy made in another order, elsewhere, has the same digest; one changed byte has another."""
    again = make_tree(tmp_path / "elsewhere")  # on another file system
    assert import_directory(str(state), str(again), "again:1").digest == image
    (again / "etc/passwd").write_text("root:x:0:0::/root:/bin/SH\n")
    settle(again)
    assert import_directory(str(state), str(again), "other:1").digest != image


@pytest.mark.requires("zstd")
@pytest.mark.parametrize("packed", ["plain", "gzip", "zstd"])
def test_a_tar_becomes_the_same_files(state: Path, tree: Path, tmp_path: Path, packed: str) -> None:
    """What GNU tar wrote, as it is or packed, is unpacked to the same tree; and a second time it is the same image."""
    words = ["tar", "--xattrs", "--numeric-owner", "--format=pax", "-C", str(tree), "-cf", "-", "."]
    data = subprocess.run(words, capture_output=True, check=True).stdout
    if packed != "plain":
        data = subprocess.run([packed, "-c"], input=data, capture_output=True, check=True).stdout
    (tmp_path / "a.tar").write_bytes(data)
    record = import_tar(str(state), str(tmp_path / "a.tar"), "tar:1")
    assert list(differences(str(files_of(state, record.digest)[0]), str(tree))) == [
        "/usr/bin/set-uid: mode 0755 instead of 4755"
    ]
    assert record.layers[0].digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    said = command(state, "import", "-", "tar:2", stdin=None, input=data)
    assert said.stdout.decode().strip() == record.digest


def test_what_is_mounted_in_a_directory_stays_out_and_symlinks_are_not_followed(
    state: Path, tmp_path: Path
) -> None:
    """A mount point is imported empty, a symlink out of the tree as a symlink."""
    (tmp_path / "root/mnt").mkdir(parents=True)
    (tmp_path / "root/out").symlink_to("/etc")
    script = 'mount -t tmpfs none "$PLACE/root/mnt"; echo secret > "$PLACE/root/mnt/file"'
    environment = {"RINGFENCE_STATE_DIR": str(state), "PLACE": str(tmp_path)}
    said = ringfence("image", "import", tmp_path / "root", "mine:1", mounts=script, env=environment)
    files = files_of(state, said.stdout.decode().strip())[0]
    assert os.listdir(files / "mnt") == []
    assert os.readlink(files / "out") == "/etc"


def _bad_tars() -> dict[str, bytes]:
    def made(*members: tuple[str, bytes, str]) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, kind, link in members:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, link
                tar.addfile(info)
        return out.getvalue()

    return {
        "empty": b"",
        "garbage": b"no tar" * 1000,
        "upwards": made(("../evil", tarfile.REGTYPE, "")),
        "through a symlink": made(("a", tarfile.SYMTYPE, "/tmp"), ("a/evil", tarfile.REGTYPE, "")),
        "broken gzip": b"\x1f\x8b\x08\0\0\0\0\0garbage",
        "broken zstd": b"\x28\xb5\x2f\xfdgarbage",
        "cut short": made(("a", tarfile.REGTYPE, ""))[:300],
    }


@pytest.mark.parametrize("kind", _bad_tars())
def test_a_bad_tar_is_one_error_and_leaves_nothing(state: Path, tmp_path: Path, kind: str) -> None:
    """It says what is wrong with which entry, and nothing is in the store afterwards."""
    (tmp_path / "bad.tar").write_bytes(_bad_tars()[kind])
    said = command(state, "import", tmp_path / "bad.tar", "bad:1")
    if kind == "empty" and said.returncode == 0:  # an empty archive is an archive, and so is an empty image
        return
    lines = said.stderr.decode().splitlines()
    assert said.returncode == 125
    assert lines[-1].startswith("ringfence: ") and lines[-1].endswith("[RF-IMAGE]")
    assert contents(state) == []


def test_a_directory_that_cannot_be_an_image_is_one_error(state: Path, tmp_path: Path) -> None:
    """An owner beyond the ids of a sandbox is named; nothing stays."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/file").touch()
    os.chown(tmp_path / "root/file", 70000, 0)
    said = command(state, "import", tmp_path / "root", "bad:1")
    assert b"'file' belongs to 70000:0" in said.stderr
    assert contents(state) == []


def test_names_are_one_thing_and_images_another(state: Path, image: str, tree: Path) -> None:
    """An image goes with its last name; a digest takes all names along; nothing of it stays."""
    import_directory(str(state), str(tree), "second:1")
    assert remove(str(state), "mine:1").images == ()
    assert store.resolve(str(state), "mine:1") is None
    assert store.resolve(str(state), "second:1") == image
    import_directory(str(state), str(tree), "third:1")
    removed = remove(str(state), image)
    assert removed.names == ("second:1", "third:1")
    assert removed.freed_bytes > 1 << 20
    assert contents(state) == []
    with pytest.raises(ImageError, match="no image"):
        remove(str(state), image)


def test_what_another_image_needs_stays(state: Path, image: str, tree: Path) -> None:
    """Two images of one layer: removing one takes its own configuration and no layer."""
    import_directory(str(state), str(tree), "foreign:1", platform="linux/s390x")
    assert len(store.records(str(state))) == 2
    assert remove(str(state), "foreign:1").layers == 0
    assert files_of(state, image)[0].is_dir()
    assert verify(str(state), store.records(str(state))).problems == ()


def test_an_image_whose_name_moved_on_goes_with_prune(state: Path, image: str, tmp_path: Path) -> None:
    """The old image of a name stays until `prune`, which says what it took and does nothing the second time."""
    (tmp_path / "new").mkdir()
    newer = import_directory(str(state), str(tmp_path / "new"), "mine:1").digest
    assert {record.digest for record in store.records(str(state))} == {image, newer}
    done = json.loads(command(state, "prune", "--json").stdout)
    assert (done["images"], done["layers"], done["blobs"]) == ([image], 1, 3)
    assert prune(str(state)).freed_bytes == 0
    assert store.resolve(str(state), "mine:1") == newer


def test_an_image_in_use_is_neither_removed_nor_pruned(state: Path, image: str, tmp_path: Path) -> None:
    """Whoever holds an image keeps it, named or not, whole; once he lets go it can go."""
    path = store.record_path(str(state), image)
    claim = hold(path)
    refused(command(state, "rm", "mine:1"), 125, "in use by a sandbox", "ringfence ps")
    (tmp_path / "new").mkdir()
    import_directory(str(state), str(tmp_path / "new"), "mine:1")
    assert prune(str(state)).images == ()
    assert (files_of(state, image)[0] / "etc/passwd").exists()
    os.close(claim)
    assert prune(str(state)).images == (image,)


def test_a_claim_and_a_removal_exclude_each_other(state: Path, image: str) -> None:
    """A removal under way makes a start wait, and then find no image; a claim makes a removal fail."""
    path = store.record_path(str(state), image)
    taken = take_away(path)
    program = "import sys; from ringfence.image.hold import hold; print('begun', flush=True); print(hold(sys.argv[1]))"
    waiter = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    assert waiter.stdout
    assert waiter.stdout.readline() == b"begun\n"
    os.unlink(path)
    os.close(taken)
    assert waiter.communicate(timeout=10)[0] == b"-1\n"
    assert hold(path) == -1


def test_who_may_only_read_a_record_keeps_nobody_from_starting(state: Path, image: str) -> None:
    """Other users of the host can read root's records; none of the locks that they can take is in a start's way."""
    path = store.record_path(str(state), image)
    reader = os.open(path, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="Bad file descriptor"):
        fcntl.lockf(reader, fcntl.LOCK_EX)
    fcntl.lockf(reader, fcntl.LOCK_SH)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from ringfence.image.hold import hold; print(hold(sys.argv[1]))",
            path,
        ],
        capture_output=True,
        timeout=10,
        check=True,
    )
    assert int(done.stdout) > 0
    os.close(reader)


def test_a_claim_ends_with_its_last_holder(state: Path, image: str) -> None:
    """A claim that a child inherits lives as long as the child, however that ends: the kernel keeps it."""
    path = store.record_path(str(state), image)
    claim = hold(path)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[claim])
    os.close(claim)
    with pytest.raises(ImageError, match="in use"):
        remove(str(state), "mine:1")
    child.kill()
    child.wait()
    assert remove(str(state), "mine:1").images == (image,)


def test_what_a_pull_is_bringing_is_left_alone(state: Path, image: str) -> None:
    """While somebody works, blobs and layers without a record stay, and the user is told; later they go."""
    stray = Path(store.blob_path(str(state), "sha256:" + "0" * 64))
    with store.working(str(state)):
        stray.write_bytes(b"on its way")
        assert "being brought" in prune(str(state)).note
        assert "being brought" in remove(str(state), "mine:1").note
        assert stray.exists()
    assert prune(str(state)).blobs == 4
    assert contents(state) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("content", "/etc/passwd: another content"),
        ("mode", "/usr/bin/set-uid: mode 0700 instead of 0755"),
        ("owner", "/etc/passwd: owner 1:1 instead of 0:0"),
        ("extra", "/etc/evil: not part of the layer"),
        ("missing", "/usr/link: missing"),
        ("kind", "/var/empty: a symlink instead of a directory"),
        ("target", "/usr/link: another target"),
        ("attribute", "/etc/passwd: other extended attributes"),
        ("time", "/etc/passwd: another modification time"),
        ("layer", "missing"),
        ("blob", "another content"),
        ("no blob", "missing"),
    ],
)
def test_verify_finds_every_kind_of_damage(state: Path, image: str, damage: str, words: str) -> None:
    """One changed thing is found and named exactly; the status is 1; without damage it is 0."""
    files = files_of(state, image)[0]
    passwd = files / "etc/passwd"
    if damage == "content":
        passwd.write_text("root:x:0:0::/root:/bin/SH\n")
        os.utime(passwd, ns=(TIME_NS, TIME_NS))
    elif damage == "mode":
        (files / "usr/bin/set-uid").chmod(0o700)
    elif damage == "owner":
        os.chown(passwd, 1, 1)
    elif damage == "extra":
        (files / "etc/evil").touch()
        os.utime(files / "etc", ns=(TIME_NS, TIME_NS))
    elif damage in ("missing", "target"):
        (files / "usr/link").unlink()
        if damage == "target":
            (files / "usr/link").symlink_to("/etc/shadow")
            os.chown(files / "usr/link", 33, 33, follow_symlinks=False)
            os.utime(files / "usr/link", ns=(TIME_NS, TIME_NS), follow_symlinks=False)
        os.utime(files / "usr", ns=(TIME_NS, TIME_NS))
    elif damage == "kind":
        (files / "var/empty").rmdir()
        (files / "var/empty").symlink_to("/")
        os.utime(files / "var", ns=(TIME_NS, TIME_NS))
    elif damage == "attribute":
        os.removexattr(passwd, "user.note")
    elif damage == "time":
        os.utime(passwd)
    elif damage == "layer":
        files.rename(files.parent / "moved")
    else:
        blob = Path(store.blob_path(str(state), store.read_record(str(state), image).layers[0].digest))
        if damage == "blob":
            blob.write_bytes(b"x" + blob.read_bytes()[1:])
        else:
            blob.unlink()
    problems = verify(str(state), store.records(str(state))).problems
    assert any(line.endswith(words) for line in problems), problems
    assert len(problems) <= 2, problems  # a hard link shows under both its names


def test_verify_says_what_it_checked(state: Path, image: str) -> None:
    """Status 0 and no problems for a sound store, 1 with the lines on stdout for another."""
    said = command(state, "verify", "--json")
    assert said.returncode == 0
    assert json.loads(said.stdout) == {"images": [image], "blobs": 3, "layers": 1, "problems": []}
    (files_of(state, image)[0] / "etc/evil").touch()
    said = command(state, "verify", "mine:1")
    assert said.returncode == 1
    assert b"/etc/evil: not part of the layer" in said.stdout
    assert not [name for name in contents(state) if ".verify" in name]


def test_a_broken_blob_is_never_believed(state: Path, image: str, tree: Path) -> None:
    """A blob cut short or changed is refused and removed when an image of it is published, and comes anew."""
    record = store.read_record(str(state), image)
    remove(str(state), "mine:1")
    import_directory(str(state), str(tree), "mine:1")
    blob = Path(store.blob_path(str(state), record.layers[0].digest))
    whole = blob.read_bytes()
    for broken in (whole[:-1000], b"x" + whole[1:]):
        os.unlink(store.record_path(str(state), image))
        blob.write_bytes(broken)
        with store.working(str(state)), pytest.raises(BrokenBlob):
            publish(str(state), "mine:2", image, source="test")
        assert not blob.exists()
        assert import_directory(str(state), str(tree), "mine:1").digest == image


def test_a_record_is_never_replaced(state: Path, image: str, tree: Path) -> None:
    """Importing the same image again keeps the file that sandboxes hold their claims on."""
    before = os.stat(store.record_path(str(state), image)).st_ino
    import_directory(str(state), str(tree), "again:1")
    assert os.stat(store.record_path(str(state), image)).st_ino == before


def test_a_damaged_record_is_named_and_another_import_repairs_it(state: Path, image: str, tree: Path) -> None:
    """Half a record is one error with its path, also for `prune`, which removes nothing then."""
    path = Path(store.record_path(str(state), image))
    path.write_bytes(path.read_bytes()[:100])
    for words in (("ls",), ("inspect", "mine:1"), ("prune",)):
        said = command(state, *words)
        assert said.returncode == 125
        assert str(path) in said.stderr.decode() and b"Traceback" not in said.stderr
    assert import_directory(str(state), str(tree), "mine:1").digest == image
    assert command(state, "ls").returncode == 0


def _import(state: str, tree: str, name: str) -> None:
    import_directory(state, tree, name)


def test_many_imports_and_prunes_at_once_leave_a_sound_store(state: Path, tree: Path) -> None:
    """Six at once, the same and others, with prunes between: every image is whole in the end."""
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_import, args=(str(state), str(tree), f"mine:{count % 3}"))
        for count in range(6)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        prune(str(state))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert list(store.names(str(state))) == ["mine:0", "mine:1", "mine:2"]
    assert verify(str(state), store.records(str(state))).problems == ()


def test_imports_killed_at_any_moment_leave_a_store_that_works(state: Path, tree: Path) -> None:
    """kill -9 at random moments: nothing half-made has a name, prune removes all that is left, the next one works."""
    words = [RINGFENCE, "image", "import", str(tree), "mine:1"]
    environment = {**os.environ, "RINGFENCE_STATE_DIR": str(state)}
    begun = time.monotonic()
    assert subprocess.run(words, env=environment, capture_output=True).returncode == 0
    whole_s = time.monotonic() - begun
    assert empty(state) == []
    for _ in range(15):
        process = subprocess.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(random.uniform(0.05, whole_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert verify(str(state), store.records(str(state))).problems == ()
        prune(str(state))
        assert contents(state) == [] or store.names(str(state)) == {"mine:1": _only(state)}
        assert not [name for name in contents(state) if "/." in name or name.startswith(".")]
    assert empty(state) == []
    assert subprocess.run(words, env=environment, capture_output=True).returncode == 0


def _only(state: Path) -> str:
    [record] = store.records(str(state))
    return record.digest


@pytest.fixture
def full(state: Path, tmp_path: Path) -> Iterator[str]:
    """A script that puts a small file system under the state directory."""
    yield f'mount -t tmpfs -o size=1m,mode=711 none "{state}"'


def test_a_full_disk_is_one_error(state: Path, tree: Path, full: str) -> None:
    """It names the place and what to do."""
    environment = {"RINGFENCE_STATE_DIR": str(state)}
    said = ringfence("image", "import", tree, "mine:1", mounts=full, env=environment)
    assert said.returncode == 125
    last = said.stderr.decode().splitlines()[-1]
    assert "No space left on device" in last and "prune" in last, last


def test_a_read_only_store_is_one_error(state: Path, tree: Path, image: str) -> None:
    """Looking works, changing says why not."""
    script = f'mount --bind "{state}" "{state}"; mount -o remount,bind,ro "{state}"'
    environment = {"RINGFENCE_STATE_DIR": str(state)}
    assert b"mine:1" in ringfence("image", "ls", mounts=script, env=environment).stdout
    for words in (("import", tree, "other:1"), ("rm", "mine:1"), ("prune",)):
        said = ringfence("image", *words, mounts=script, env=environment)
        assert said.returncode == 125
        assert b"Read-only file system" in said.stderr and b"Traceback" not in said.stderr


@pytest.mark.parametrize(
    ("words", "status", "part"),
    [
        ((), 2, "COMMAND"),
        (("nonsense",), 2, "invalid choice"),
        (("rm",), 2, "NAME"),
        (("rm", "host"), 125, "nothing to remove"),
        (("rm", "nothing"), 125, "no image 'nothing'"),
        (("rm", "../images"), 125, "is not an image reference"),
        (("inspect", "0123456789ab"), 125, "no image"),
        (("history", "nothing"), 125, "no image"),
        (("export", "nothing", "oci:/tmp/x"), 125, "no image"),
        (("export", "mine:1", "/tmp/x"), 2, "oci:DIR"),
        (("verify", "nothing"), 125, "no image"),
        (("import", "/nothing", "a"), 125, "no such file"),
        (("import", "/dev/null", "a"), 125, "no regular file"),
        (("import", "/etc", "oci:x"), 2, "no name for an image here"),
        (("import", "/etc", "UPPER"), 125, "capitals"),
        (("import", "/etc"), 2, "needs a name"),
        (("import", "oci:/nothing:x"), 125, ""),
        (("import", "/etc", "a", "--platform", "windows/amd64"), 125, "platform"),
        (("bootstrap", "alpine"), 125, "cannot bootstrap"),
        (("bootstrap", "base", "--suite", "sid"), 125, "no suite"),
        (("bootstrap", "debian:sid"), 125, "no suite"),
        (("bootstrap", "debian:bookworm", "--include", "a;b"), 125, "no name of a Debian package"),
    ],
)
def test_nonsense_is_one_clear_error(state: Path, words: tuple[str, ...], status: int, part: str) -> None:
    """Wrong words end in one line that says what is wrong, and leave nothing."""
    said = command(state, *words)
    assert said.returncode == status, said.stderr
    last = said.stderr.decode().splitlines()[-1]
    assert last.startswith("ringfence: ") and part in last, last
    assert b"Traceback" not in said.stderr
    assert said.stdout == b""
    assert contents(state) == []


def test_the_list_and_the_record_say_what_is_there(state: Path, image: str) -> None:
    """Table, JSON, inspect and history agree; a name and a beginning of the digest mean the same."""
    table = command(state, "ls").stdout.decode().splitlines()
    assert [line.split()[:2] for line in table[1:]] == [
        ["host", table[1].split()[1]],
        ["mine:1", image.removeprefix("sha256:")[:12]],
    ]
    [_, row] = json.loads(command(state, "ls", "--json").stdout)
    assert (row["name"], row["digest"], row["platform"]) == ("mine:1", image, "linux/amd64")
    by_name = json.loads(command(state, "inspect", "mine:1").stdout)
    assert by_name == json.loads(command(state, "inspect", image[:20]).stdout)
    assert by_name["config"]["env"] == [by_name["config"]["env"][0]]
    assert by_name["unpacked"] == [str(files_of(state, image)[0])]
    steps = json.loads(command(state, "history", "mine:1", "--json").stdout)
    assert [step["created_by"] for step in steps] == ["ringfence image import"]


def test_other_users_cannot_reach_into_the_store(state: Path, image: str) -> None:
    """Layers of an import may hold what others could change: an ordinary user reads neither them nor blobs."""
    layer = files_of(state, image)[0]
    for path in (layer / "tmp", layer / "etc/passwd", state / "images/blobs/sha256"):
        said = subprocess.run(
            ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "ls", path], capture_output=True
        )
        assert b"Permission denied" in said.stderr, path
    said = subprocess.run(
        ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "ls", state / "images/refs"],
        capture_output=True,
    )
    assert said.stdout == b"mine%3A1\n"


def test_removals_killed_at_any_moment_leave_a_whole_image_or_none(state: Path, tree: Path) -> None:
    """kill -9 of `rm`: either the image is there and sound, or it is gone and prune takes what is left of it."""
    environment = {**os.environ, "RINGFENCE_STATE_DIR": str(state)}
    for _ in range(12):
        digest = import_directory(str(state), str(tree), "mine:1").digest
        process = subprocess.Popen(
            [RINGFENCE, "image", "rm", "mine:1"], env=environment, stdout=subprocess.DEVNULL
        )
        try:
            process.wait(random.uniform(0.03, 0.15))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if store.resolve(str(state), "mine:1") is None:
            prune(str(state))
            assert contents(state) == []
        else:
            assert verify(str(state), [store.read_record(str(state), digest)]).problems == ()


def test_a_user_without_privileges_has_a_store_of_his_own(state: Path, tmp_path: Path) -> None:
    """Import, verify, list and remove work; what is his is root's in the image, and directories that even he may
    not write to can be removed."""
    user = 4242
    os.chown(state, user, user)
    root = state.parent / "mine"
    (root / "closed").mkdir(parents=True)
    (root / "closed/file").write_text("x")
    (root / "closed").chmod(0o555)
    for path in (root, root / "closed", root / "closed/file"):
        os.chown(path, user, user)
    become = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all")
    environment = {**os.environ, "RINGFENCE_STATE_DIR": str(state), "HOME": "/"}

    def image(*words: str | Path) -> str:
        done = subprocess.run(
            [*become, RINGFENCE, "image", *words], env=environment, capture_output=True, text=True, cwd="/"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    digest = image("import", root, "mine").strip()
    assert "mine:latest" in image("ls")
    image("verify")
    assert import_directory_as_root(root, tmp_path) == digest
    image("rm", "mine")
    assert contents(state) == []


def import_directory_as_root(root: Path, place: Path) -> str:
    """The digest of a directory imported by root, to whom all of it is given first."""
    for path in (root, *root.rglob("*")):
        os.chown(path, 0, 0)
    (place / "roots").mkdir(mode=0o711)
    return import_directory(str(place / "roots"), str(root), "mine:1").digest
