"""Images under a policy: how a sandbox starts from one, what of its wishes counts, and who may remove it meanwhile."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import ringfence
from registry import registry
from ringfence.errors import ImageError, UsageError
from ringfence.image import store
from ringfence.image.hold import hold
from ringfence.image.manifest import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from ringfence.image.publish import add_blob, publish
from ringfence.image.removal import remove
from ringfence.linux.paths import state_dir

pytestmark = pytest.mark.requires("root", "crun", "image:base", "x86_64")
CLI = str(Path(sys.executable).with_name("ringfence"))
D, F = tarfile.DIRTYPE, tarfile.REGTYPE
UID, GID = 1234, 2345
Entry = tuple[str, bytes, bytes, int, int]
ACCOUNTS = b"root:x:0:0::/root:/bin/sh\napp:x:1234:2345::/srv:/bin/sh\n"
LOWER: Sequence[Entry] = [
    ("etc/passwd", F, ACCOUNTS, 0o644, 0),
    ("etc/group", F, b"root:x:0:\nweb:x:4321:\n", 0o644, 0),
    ("srv", D, b"", 0o755, 0),
    ("srv/secret", F, b"for app\n", 0o600, UID),
    ("srv/gone", F, b"old", 0o644, 0),
    ("srv/hidden", D, b"", 0o755, 0),
    ("srv/hidden/file", F, b"old", 0o644, 0),
    ("srv/changed", F, b"old", 0o644, 0),
]
UPPER: Sequence[Entry] = [
    ("srv/.wh.gone", F, b"", 0o644, 0),
    ("srv/hidden", D, b"", 0o755, 0),
    ("srv/hidden/.wh..wh..opq", F, b"", 0o644, 0),
    ("srv/hidden/new", F, b"new", 0o644, 0),
    ("srv/changed", F, b"new", 0o644, 0),
]


def layer(entries: Sequence[Entry]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind, content, mode, uid in entries:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid = kind, mode, uid, GID if uid else 0
            info.size, info.mtime = len(content), 1_600_000_000
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def image(state: str, name: str, upper: Sequence[Entry] = UPPER, **config: object) -> str:
    """Put an image on top of base into the store of `state`, configured by `config`; return its digest."""
    base = store.read_record(state, str(store.resolve(state, "base:latest")))
    lowest = base.layers[0]
    described = [{"mediaType": lowest.media_type, "digest": lowest.digest, "size": lowest.size_bytes}]
    diff_ids = [lowest.diff_id]
    for entries in (LOWER, upper):
        data = layer(entries)
        diff_ids.append(add_blob(state, data))
        described.append({"mediaType": OCI_LAYER, "digest": diff_ids[-1], "size": len(data)})
    about = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    data = json.dumps(about).encode()
    reference = {"mediaType": OCI_CONFIG, "digest": add_blob(state, data), "size": len(data)}
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": reference, "layers": described}
    digest = add_blob(state, json.dumps(manifest).encode())
    with store.working(state):
        return publish(state, name, digest, source="test").digest


@pytest.fixture(scope="module")
def state() -> Iterator[str]:
    """A state directory of the module's own, whose store has base, taken over from the machine's."""
    real = state_dir()
    record = store.read_record(real, str(store.resolve(real, "base:latest")))
    with tempfile.TemporaryDirectory(prefix="ringfence-images-", dir="/var/tmp") as place:
        Path(place).chmod(0o711)
        mine = f"{place}/state"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RINGFENCE_STATE_DIR", mine)
            patch.setenv("RINGFENCE_RUN_DIR", f"{place}/run")
            state_dir()
            store.make_store(mine)
            for digest in record.blobs():
                os.link(store.blob_path(real, digest), store.blob_path(mine, digest))
            with store.working(mine):
                publish(mine, "base:latest", record.digest, source="test")
            yield mine


def sh(image: str, script: str, **more: object) -> ringfence.Result:
    result = ringfence.run(["/bin/sh", "-c", script], image=image, timeout=20, **more)  # type: ignore[arg-type]
    assert result.exit_status == 0, result.stderr
    return result


def lines(result: ringfence.Result) -> list[str]:
    return result.stdout.decode().splitlines()


def test_an_image_starts_as_it_says(state: str) -> None:
    """Entrypoint, command, environment and working directory come from the image; words given replace its command."""
    script = 'echo "$0 $1 $COLOUR"; pwd'
    image(
        state,
        "start:1",
        Entrypoint=["/bin/sh", "-c", script],
        Cmd=["own", "words"],
        Env=["COLOUR=red", "PATH=/usr/bin:/bin"],
        WorkingDir="/made/for it",
    )
    assert lines(ringfence.run(image="start:1")) == ["own words red", "/made/for it"]
    result = ringfence.run(["given"], image="start:1", env={"COLOUR": "blue"}, cwd="/srv")
    assert lines(result) == ["given  blue", "/srv"]


def test_an_image_without_a_command_needs_one(state: str) -> None:
    image(state, "silent:1")
    with pytest.raises(UsageError, match="the image names none"):
        ringfence.run(image="silent:1")


@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("", "1000 1000"),
        ("root", "1000 1000"),
        ("0:0", "1000 1000"),
        ("app", f"{UID} {GID}"),
        ("app:web", f"{UID} 4321"),
        ("4000", "4000 4000"),
        ("4000:5000", "4000 5000"),
        ("1234:0", f"{UID} {UID}"),
    ],
)
def test_the_user_of_an_image_is_a_wish(state: str, user: str, ids: str) -> None:
    """Names are looked up in the image; root becomes the dedicated user, in a range of its own as everybody."""
    image(state, "user:1", User=user)
    result = sh("user:1", "echo $(id -u) $(id -g); cat /proc/self/uid_map; grep CapBnd /proc/self/status")
    first, mapping, capabilities = lines(result)
    assert first == ids
    assert mapping.split()[0] == "0"
    assert int(mapping.split()[1]) >= 0x70000000
    assert int(capabilities.split()[1], 16) == 0


def test_the_policy_has_the_last_word_on_the_user(state: str) -> None:
    image(state, "user:2", User="app")
    assert lines(sh("user:2", "id -u", overrides={"user": "77:78"})) == ["77"]
    assert lines(sh("user:2", "id -u", overrides={"user": "0:0"})) == ["0"]


@pytest.mark.parametrize("user", ["nobody-here", "app:nobody-here", "70000", "99999999999"])
def test_a_user_that_the_image_does_not_know_is_refused(state: str, user: str) -> None:
    """The host's own passwd, which knows other names, is never asked."""
    image(state, "user:3", User=user)
    with pytest.raises(ImageError, match="--user UID:GID"):
        ringfence.run(["true"], image="user:3")


def test_layers_are_seen_as_one_with_their_owners(state: str) -> None:
    """Whiteouts hide, opaque directories start anew, a file of the image's user is his to read."""
    image(state, "layers:1", User="app")
    result = sh("layers:1", "cd /srv; ls -a; ls hidden; cat changed secret; stat -c %u secret changed")
    assert lines(result) == [
        *(".", "..", "changed", "hidden", "secret"),
        "new",
        "newfor app",
        *(str(UID), "0"),
    ]


def test_volumes_are_writable_within_the_disk_limit(state: str) -> None:
    """They share one bounded tmpfs with the work directory; the rest of the root stays read-only."""
    image(state, "volumes:1", Volumes={"/srv/data": {}, "/var/lib/app": {}})
    script = (
        "echo a > /srv/data/f; echo b > /var/lib/app/f; echo c > /work/f; touch /srv/x 2>/dev/null || echo ro;"
        "head -c 6M /dev/zero > /srv/data/big && head -c 6M /dev/zero > /work/big 2>/dev/null || echo full"
    )
    result = sh("volumes:1", script, overrides={"limits.disk": "8MiB"})
    assert lines(result) == ["ro", "full"]
    assert result.proof is not None
    assert result.proof["holds"]
    for path in ("/work", "/srv/data", "/var/lib/app"):
        (line,) = [line for line in result.proof["lines"] if line["control"] == f"mount:{path}"]
        assert line["observed"] == f"tmpfs rw,nosuid,nodev size={8 << 20} inodes=16384"
    assert lines(sh("volumes:1", "ls /srv/data | wc -l")) == ["0"]


def test_volumes_inside_each_other_and_around_a_mount(state: str, tmp_path: Path) -> None:
    """The inner one is part of the outer one; a mount of the policy in a volume is there."""
    image(state, "volumes:3", Volumes={"/srv/a": {}, "/srv/a/b": {}, "/srv/c": {}})
    (tmp_path / "file").write_text("mine\n")
    mounts = [{"source": str(tmp_path), "target": "/srv/c/d"}]
    script = "mkdir -p /srv/a/b && touch /srv/a/b/f && cat /srv/c/d/file"
    assert lines(sh("volumes:3", script, overrides={"filesystem.mounts": mounts})) == ["mine"]


def test_a_passwd_that_a_layer_deletes_is_not_asked(state: str) -> None:
    """A whiteout counts: a user of a lower layer's passwd is not known any more."""
    try:
        without = [*UPPER, ("etc/.wh.passwd", F, b"", 0o644, 0)]
        image(state, "deleted:1", without, User="app")
        with pytest.raises(ImageError, match="not in its /etc/passwd"):
            ringfence.run(["true"], image="deleted:1")
    finally:
        remove(state, "deleted:1")


@pytest.mark.parametrize("path", ["/proc", "/dev/shm", "/a/../../etc", "relative"])
def test_a_volume_where_none_can_be_is_refused(state: str, path: str) -> None:
    image(state, "volumes:2", Volumes={path: {}})
    with pytest.raises(ringfence.RingfenceError, match="volume"):
        ringfence.run(["true"], image="volumes:2")


def test_images_on_one_base_store_it_once(state: str) -> None:
    """A second image adds only its own layers, and running them copies nothing."""
    image(state, "one:1", Labels={"a": "1"})
    before = sorted(os.listdir(store.images_dir(state, "layers")))
    image(state, "one:2", Labels={"a": "2"})
    sh("one:2", "true")
    assert sorted(os.listdir(store.images_dir(state, "layers"))) == before


def test_an_image_in_use_is_not_removed(state: str) -> None:
    """Whoever runs it holds it, also a detached sandbox whose launcher is gone; afterwards it goes."""
    digest = image(state, "held:1", Labels={"held": "yes"})
    done = subprocess.run(
        [CLI, "run", "-d", "--image", "held:1", "--", "sleep", "30"],
        capture_output=True,
        text=True,
        check=True,
    )
    sandbox = done.stdout.strip()
    try:
        with pytest.raises(ImageError, match="in use"):
            remove(state, "held:1")
        refused = subprocess.run([CLI, "image", "rm", "held:1"], capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "in use" in refused.stderr
        assert subprocess.run([CLI, "image", "prune"], capture_output=True, check=False).returncode == 0
        inside = [CLI, "exec", sandbox, "--", "cat", "/srv/changed"]
        assert subprocess.run(inside, capture_output=True, check=True).stdout == b"new"
    finally:
        subprocess.run([CLI, "rm", "--force", sandbox], capture_output=True, check=True)
    remove(state, "held:1")
    assert hold(store.record_path(state, digest)) == -1
    with pytest.raises(ImageError, match="held:1"):
        ringfence.run(["true"], image="held:1", pull="never")


def test_the_stop_signal_of_the_image_is_used(state: str) -> None:
    """`stop` sends what the image asks for, so that its program can end in its own way."""
    image(state, "stop:1", StopSignal="SIGUSR1")
    script = "trap 'echo bye; exit 7' USR1; echo ready; while :; do sleep 0.05; done"
    done = subprocess.run(
        [CLI, "run", "-d", "--image", "stop:1", "--", "/bin/sh", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    sandbox = done.stdout.strip()
    try:
        with subprocess.Popen([CLI, "logs", "-f", sandbox], stdout=subprocess.PIPE, text=True) as log:
            assert log.stdout is not None
            assert log.stdout.readline() == "ready\n"
            subprocess.run([CLI, "stop", sandbox], capture_output=True, check=True)
            assert log.stdout.read() == "bye\n"
        shown = subprocess.run([CLI, "ps", "--all", "--json"], capture_output=True, check=True).stdout
        (found,) = [one for one in json.loads(shown) if one["id"] == sandbox]
        assert found["exit_status"] == 7
    finally:
        subprocess.run([CLI, "rm", "--force", sandbox], capture_output=True, check=True)


def test_rules_of_the_policy_hold_at_every_start(state: str) -> None:
    """An image that breaks them is not run, although it is here, and although its plan may be cached."""
    image(state, "rules:1")
    sh("rules:1", "true")
    with pytest.raises(ImageError, match="does not allow"):
        ringfence.run(["true"], image="rules:1", overrides={"image.allowed_registries": []})
    with pytest.raises(ImageError, match="digest_required"):
        ringfence.run(["true"], image="rules:1", overrides={"image.digest_required": True})
    with pytest.raises(ImageError, match="does not allow"):
        ringfence.run(["true"], image="host", overrides={"image.allowed_registries": []})
    sh("rules:1", "true", overrides={"image.allowed_registries": ["local"]})


@pytest.mark.requires("skopeo", "docker-registry")
def test_run_fetches_what_is_not_here_and_then_needs_no_registry(state: str, tmp_path: Path) -> None:
    """`run --image` pulls once; afterwards it works offline, and `always` and `never` mean what they say."""
    image(state, "pushed:1", Cmd=["/bin/cat", "/srv/changed"])
    layout = tmp_path / "layout"
    subprocess.run([CLI, "image", "export", "pushed:1", f"oci:{layout}:v1"], capture_output=True, check=True)
    with registry(tmp_path / "registry") as port:
        name = f"127.0.0.1:{port}/team/app:1"
        push = ["skopeo", "copy", "--dest-tls-verify=false", f"oci:{layout}:v1", f"docker://{name}"]
        subprocess.run(push, capture_output=True, check=True)
        with pytest.raises(ImageError, match="no image"):
            ringfence.run(image=name, pull="never")
        assert ringfence.run(image=name).stdout == b"new"
        assert ringfence.run(image=name, pull="always").stdout == b"new"
    assert ringfence.run(image=name).stdout == b"new"
    done = subprocess.run([CLI, "run", "--image", name], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"new", b"")
    with pytest.raises(ImageError) as refused:
        ringfence.run(image=name, pull="always")
    assert "\n" not in str(refused.value)


@pytest.mark.requires("skopeo", "docker-registry")
def test_an_image_fetched_anew_for_its_signature_is_the_one_that_runs(state: str, tmp_path: Path) -> None:
    """One that is here but was not fetched under the policy for signatures does not run in place of one that was."""
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    with registry(tmp_path / "registry") as port:
        name = f"127.0.0.1:{port}/team/signed:1"
        for said in ("unsigned", "signed"):
            image(state, f"{said}:1", Cmd=["/bin/echo", said])
            layout = f"oci:{tmp_path / said}:v1"
            subprocess.run([CLI, "image", "export", f"{said}:1", layout], capture_output=True, check=True)
            push = ["skopeo", "copy", "--dest-tls-verify=false", layout, f"docker://{name}"]
            subprocess.run(push, capture_output=True, check=True)
            if said == "unsigned":
                assert ringfence.run(image=name).stdout == b"unsigned\n"
        asked = {"image.signatures": str(policy)}
        first = ringfence.run(image=name, overrides=asked)
    assert first.stdout == b"signed\n"
    assert first.proof is not None
    assert first.proof["image_digest"] == store.resolve(state, name)
    assert ringfence.run(image=name, overrides=asked).stdout == b"signed\n"
    # The old one under the name again: what was kept for the new one does not let it in.
    with store.locked(state):
        store.set_name(state, name, str(store.resolve(state, "unsigned:1")))
    with pytest.raises(ImageError, match="was not fetched under"):
        ringfence.run(image=name, overrides=asked, pull="never")


def test_the_digest_in_the_proof_is_that_of_the_manifest(state: str) -> None:
    """It is the hash of the manifest's bytes, which is what a registry calls the image."""
    digest = image(state, "proof:1")
    proof = sh("proof:1", "true").proof
    assert proof is not None
    manifest = Path(store.blob_path(state, digest)).read_bytes()
    assert proof["image_digest"] == digest == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
