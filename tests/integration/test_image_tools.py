"""Images of other tools here, ours there: skopeo, podman, umoci and buildah; disk images and what they show."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from commands import ringfence
from imagetrees import contents, files_of, make_tree, quick_place
from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.compare import differences
from ringfence.image.disks import disk, disk_path
from ringfence.image.exporting import export_archive, export_directory
from ringfence.image.importing import import_directory, import_image, import_tar
from ringfence.image.record import ImageRecord
from ringfence.image.removal import prune, remove
from ringfence.image.verifying import verify

pytestmark = pytest.mark.requires("root")

SET_UID = ["/usr/bin/set-uid: mode 0755 instead of 4755"]


@pytest.fixture
def state() -> Iterator[Path]:
    with quick_place() as place:
        (place / "state").mkdir(mode=0o711)
        yield place / "state"


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    with quick_place() as place:
        yield make_tree(place / "root", files=5)


def tool(*words: str | Path, **more: object) -> str:
    """Run another tool and return what it printed."""
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        words, check=True, stdout=subprocess.PIPE, text=True, timeout=60, **more
    ).stdout


class Podman:
    """podman with a storage of its own."""

    def __init__(self, place: Path) -> None:
        self.options = [
            *("--root", str(place / "root"), "--runroot", str(place / "run")),
            *("--tmpdir", str(place / "tmp"), "--storage-driver", "vfs"),
        ]

    def __call__(self, *words: str | Path) -> str:
        return tool("podman", *self.options, *words)


@pytest.fixture
def podman() -> Iterator[Podman]:
    with quick_place() as place:
        yield Podman(place)


@pytest.fixture
def layout(tree: Path, tmp_path: Path) -> Path:
    """An OCI layout by umoci: two layers, the second with a whiteout and a changed file, and a configuration."""
    directory = tmp_path / "layout"
    image = f"{directory}:v1"
    tool("umoci", "init", "--layout", directory)
    tool("umoci", "new", "--image", image)
    tool("umoci", "unpack", "--image", image, tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle/rootfs")
    subprocess.run(["cp", "-a", tree, tmp_path / "bundle/rootfs"], check=True)
    tool("umoci", "repack", "--image", image, tmp_path / "bundle")
    shutil.rmtree(tmp_path / "bundle")
    tool("umoci", "unpack", "--image", image, tmp_path / "bundle")
    (tmp_path / "bundle/rootfs/usr/link").unlink()
    (tmp_path / "bundle/rootfs/etc/passwd").write_text("changed\n")
    tool("umoci", "repack", "--image", image, tmp_path / "bundle")
    tool(
        *("umoci", "config", "--image", image, "--config.entrypoint", "/bin/sh", "--config.cmd", "-l"),
        *("--config.env", "A=1", "--config.workingdir", "/srv", "--config.user", "1000:1000"),
        *("--config.volume", "/data", "--config.exposedports", "80/tcp", "--config.stopsignal", "SIGINT"),
    )
    return directory


def check_layout(state: Path, record: ImageRecord) -> None:
    """The image of `layout`, however it came here."""
    assert len(record.layers) == 2
    upper = files_of(state, record.digest)[1]
    hidden = os.lstat(upper / "usr/link")
    assert (hidden.st_mode & 0o170000, hidden.st_rdev) == (0o020000, 0)
    assert (upper / "etc/passwd").read_text() == "changed\n"
    run = record.config
    assert (run.entrypoint, run.cmd, run.cwd, run.user) == (("/bin/sh",), ("-l",), "/srv", "1000:1000")
    assert "A=1" in run.env
    assert (run.volumes, run.exposed_ports, run.stop_signal) == (("/data",), ("80/tcp",), "SIGINT")
    assert verify(str(state), [record]).problems == ()


@pytest.mark.requires("umoci", "skopeo")
def test_an_image_of_umoci_is_taken_over_whole(state: Path, layout: Path, tree: Path) -> None:
    """Layers with whiteouts, and every field of the configuration; the lower layer is the tree it was made of."""
    record, name = import_image(str(state), f"oci:{layout}:v1", "")
    assert name == f"oci:{layout}:v1"
    check_layout(state, record)
    lower = files_of(state, record.digest)[0]
    found = list(differences(str(lower), str(tree)))
    assert [line for line in found if "modification time" not in line] == SET_UID


@pytest.mark.requires("umoci", "skopeo", "podman")
@pytest.mark.parametrize("form", ["docker-archive", "oci-archive"])
def test_what_podman_saves_is_taken_over(
    state: Path, layout: Path, podman: Podman, tmp_path: Path, form: str
) -> None:
    """The image that podman loads and saves again, in Docker's form and in OCI's, is here what it was."""
    podman("pull", "-q", f"oci:{layout}:v1")
    image = podman("images", "-q").strip()
    podman("save", "-q", "--format", form, "-o", tmp_path / "saved.tar", image)
    record, name = import_image(str(state), f"{form}:{tmp_path / 'saved.tar'}", "saved:1")
    assert name == "saved:1"
    check_layout(state, record)


@pytest.mark.requires("buildah", "skopeo")
def test_an_image_that_buildah_built_is_taken_over(state: Path, tree: Path, tmp_path: Path) -> None:
    """A Containerfile from scratch: its layers and its configuration."""
    (tmp_path / "Containerfile").write_text(
        'FROM scratch\nCOPY etc /etc\nCOPY usr/bin /bin\nENV A=1\nUSER nobody\nENTRYPOINT ["/bin/x"]\n'
    )
    words = ["buildah", "--root", str(tmp_path / "root"), "--runroot", str(tmp_path / "run")]
    words += ["--storage-driver", "vfs"]
    built = tool(*words, "build", "-q", "--isolation", "chroot", "-f", tmp_path / "Containerfile", tree)
    tool(*words, "push", "-q", built.strip(), f"oci:{tmp_path / 'out'}:1")
    record, _ = import_image(str(state), f"oci:{tmp_path / 'out'}:1", "built:1")
    assert (record.config.entrypoint, record.config.user) == (("/bin/x",), "nobody")
    assert "A=1" in record.config.env
    assert (files_of(state, record.digest)[-1] / "etc/passwd").exists() or len(record.layers) > 1


@pytest.mark.requires("skopeo", "podman")
def test_other_tools_read_what_export_wrote(state: Path, tree: Path, podman: Podman, tmp_path: Path) -> None:
    """skopeo finds the same digest in the layout and in the archive; podman loads it, and its files are ours."""
    record = import_directory(str(state), str(tree), "mine:1")
    export_directory(str(state), record, str(tmp_path / "layout"), "v1")
    export_archive(str(state), record, str(tmp_path / "a.tar"), "v1")
    for where in (f"oci:{tmp_path / 'layout'}:v1", f"oci-archive:{tmp_path / 'a.tar'}"):
        assert json.loads(tool("skopeo", "inspect", where))["Digest"] == record.digest
    podman("load", "-q", "-i", tmp_path / "a.tar")
    image = podman("images", "-q").strip()
    mounted = podman("image", "mount", image).strip()
    try:
        found = list(differences(mounted, str(tree)))
    finally:
        podman("image", "umount", image)
    assert [line for line in found if "modification time" not in line] == []


@pytest.mark.requires("umoci", "skopeo", "podman")
def test_an_image_of_dockers_own_kind_goes_there_and_back(
    state: Path, layout: Path, podman: Podman, tmp_path: Path
) -> None:
    """Exported after it came from a docker-archive, it is imported again to the same digest."""
    tool("skopeo", "copy", "-q", f"oci:{layout}:v1", f"docker-archive:{tmp_path / 'd.tar'}:a/b:1")
    record, _ = import_image(str(state), f"docker-archive:{tmp_path / 'd.tar'}", "docker:1")
    export_archive(str(state), record, str(tmp_path / "back.tar"), "v1")
    podman("load", "-q", "-i", tmp_path / "back.tar")
    again, _ = import_image(str(state), f"oci-archive:{tmp_path / 'back.tar'}", "back:1")
    assert again.digest == record.digest


def test_an_export_is_the_same_bytes_and_joins_a_layout(state: Path, tree: Path, tmp_path: Path) -> None:
    """Twice the same archive; a second tag joins the first in a layout, the same tag takes its place."""
    record = import_directory(str(state), str(tree), "mine:1")
    for name in ("a.tar", "b.tar"):
        export_archive(str(state), record, str(tmp_path / name), "v1")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    for tag in ("v1", "v2", "v1"):
        export_directory(str(state), record, str(tmp_path / "layout"), tag)
    index = json.loads((tmp_path / "layout/index.json").read_text())
    assert sorted(
        entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]
    ) == [
        "v1",
        "v2",
    ]


def test_an_export_never_ruins_what_is_there_and_never_writes_a_broken_blob(
    state: Path, tree: Path, tmp_path: Path
) -> None:
    """A directory with other things is refused untouched; a damaged blob ends it and nothing is left."""
    record = import_directory(str(state), str(tree), "mine:1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("kept")
    with pytest.raises(ImageError, match="no OCI layout"):
        export_directory(str(state), record, str(tmp_path / "full"), "v1")
    assert os.listdir(tmp_path / "full") == ["precious"]
    blob = Path(store.blob_path(str(state), record.layers[0].digest))
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    for write, name in ((export_directory, "new"), (export_archive, "new.tar")):
        with pytest.raises(ImageError, match="not what its name says"):
            write(str(state), record, str(tmp_path / name), "v1")
    assert os.listdir(tmp_path) == ["full"]


def layers_image(state: Path, layers: Sequence[Sequence[tuple[str, bytes, bytes]]]) -> ImageRecord:
    """An image of several layers, each of (name, type, content) entries, put into the store by hand."""
    from ringfence.image.manifest import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
    from ringfence.image.publish import add_blob, publish

    store.make_store(str(state))
    described, diff_ids = [], []
    for entries in layers:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, kind, content in entries:
                info = tarfile.TarInfo(name)
                info.type, info.mode, info.mtime = kind, 0o755, 1_600_000_000
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        digest = add_blob(str(state), out.getvalue())
        diff_ids.append(digest)
        described.append({"mediaType": OCI_LAYER, "digest": digest, "size": len(out.getvalue())})
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    data = json.dumps(config).encode()
    about = {"mediaType": OCI_CONFIG, "digest": add_blob(str(state), data), "size": len(data)}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": about, "layers": described}
    digest = add_blob(str(state), json.dumps(manifest).encode())
    with store.working(str(state)):
        return publish(str(state), "layers:1", digest, source="test", platform="linux/amd64")


D, F = tarfile.DIRTYPE, tarfile.REGTYPE
THREE_LAYERS = [
    [
        ("a", D, b""),
        ("a/lower", F, b"1"),
        ("a/gone", F, b"1"),
        ("b", D, b""),
        ("b/hidden", F, b"1"),
        ("c", F, b"1"),
    ],
    [("a", D, b""), ("a/.wh.gone", F, b""), ("b", D, b""), ("b/.wh..wh..opq", F, b""), ("b/new", F, b"2")],
    [("c", D, b""), ("c/file", F, b"3"), ("a/lower", F, b"3")],
]


@pytest.mark.requires("mkfs.erofs", "x86_64")
def test_a_disk_shows_the_layers_as_one_and_is_the_same_everywhere(state: Path, tmp_path: Path) -> None:
    """Whiteouts, opaque directories and replaced files are resolved; two builds in two places have the same bytes."""
    record = layers_image(state, THREE_LAYERS)
    path = disk(str(state), record.digest)
    assert disk(str(state), record.digest) == path == disk_path(str(state), record)
    script = (
        'mkdir "$1"; mount -t erofs -o ro,loop "$2" "$1"; cd "$1"; find . | LC_ALL=C sort; cat a/lower c/file'
    )
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
    shown = tool(*words, tmp_path / "mount", path).split("\n")
    assert shown == [".", "./a", "./a/lower", "./b", "./b/new", "./c", "./c/file", "33"]
    first = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    (tmp_path / "elsewhere").mkdir(mode=0o711)
    again = layers_image(tmp_path / "elsewhere", THREE_LAYERS)
    second = disk(str(tmp_path / "elsewhere"), again.digest)
    assert hashlib.sha256(Path(second).read_bytes()).hexdigest() == first


@pytest.mark.requires("mkfs.erofs")
def test_a_disk_has_owners_modes_times_and_attributes(state: Path, tree: Path, tmp_path: Path) -> None:
    """What the unpacked layer has, the mounted disk has; nothing of it is mounted in the host's namespace."""
    record = import_directory(str(state), str(tree), "mine:1")
    files = files_of(state, record.digest)[0]
    path = disk(str(state), record.digest)
    assert str(state) not in Path("/proc/self/mountinfo").read_text()
    script = (
        'mkdir "$1"; mount -t erofs -o ro,loop "$2" "$1"; exec tar -C "$1" --xattrs --numeric-owner -cf - .'
    )
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
    packed = subprocess.run([*words, tmp_path / "mount", path], stdout=subprocess.PIPE, check=True).stdout
    (tmp_path / "disk.tar").write_bytes(packed)
    copy = import_tar(str(state), str(tmp_path / "disk.tar"), "copy:1")
    lines = list(differences(str(files_of(state, copy.digest)[0]), str(files)))
    assert lines == []


@pytest.mark.requires("mkfs.erofs")
def test_a_disk_lives_as_long_as_an_image_that_needs_it(state: Path, tree: Path) -> None:
    """`prune` keeps it, `rm` takes it along; a build that was killed is no disk, and goes."""
    record = import_directory(str(state), str(tree), "mine:1")
    path = Path(disk(str(state), record.digest))
    (path.parent / ".new-1-dead").mkdir()
    assert prune(str(state)).unfinished == 1
    assert path.exists()
    assert remove(str(state), "mine:1").disks == 1
    assert contents(state) == []


@pytest.mark.requires("mkfs.erofs")
def test_a_disk_that_cannot_be_made_is_one_error(state: Path, tree: Path) -> None:
    """mkfs.erofs that fails leaves nothing behind, and the error has its words."""
    record = import_directory(str(state), str(tree), "mine:1")
    shutil.rmtree(files_of(state, record.digest)[0])
    with pytest.raises(ImageError, match=r"mkfs\.erofs failed"):
        disk(str(state), record.digest)
    assert [name for name in contents(state) if name.startswith("disks")] == []


@pytest.mark.requires("skopeo")
def test_the_command_line_imports_and_exports(state: Path, tree: Path, tmp_path: Path) -> None:
    """import, export and import again by commands; stdout has the digest or the place alone."""
    environment = {"RINGFENCE_STATE_DIR": str(state)}
    made = ringfence("image", "import", f"dir:{tree}", "mine", env=environment)
    digest = made.stdout.decode().strip()
    target = f"oci-archive:{tmp_path / 'a.tar'}:v7"
    said = ringfence("image", "export", "mine", target, env=environment)
    assert said.stdout.decode() == f"{target}\n"
    back = ringfence("image", "import", f"oci-archive:{tmp_path / 'a.tar'}", "back:1", env=environment)
    assert back.stdout.decode().strip() == digest
    refusal = ringfence("image", "import", tmp_path, "x", env=environment)
    assert refusal.returncode == 0  # any directory can be a root
    (tmp_path / "oci-layout").touch()
    refusal = ringfence("image", "import", tmp_path, "x", env=environment)
    assert refusal.returncode == 2
    assert f"write oci:{tmp_path}" in refusal.stderr.decode()


def test_an_export_takes_the_place_of_files_alone(state: Path, tree: Path, tmp_path: Path) -> None:
    """A FIFO, a device or a symlink at the path stays what it is: /dev/null must not become an archive."""
    record = import_directory(str(state), str(tree), "special:1")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("elsewhere")
    for name in ("fifo", "link"):
        with pytest.raises(ImageError, match="is no file"):
            export_archive(str(state), record, str(tmp_path / name), "v1")
    assert (tmp_path / "fifo").is_fifo()
    assert os.readlink(tmp_path / "link") == "elsewhere"
