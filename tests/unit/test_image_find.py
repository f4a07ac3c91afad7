"""From --image and --rootfs to an image: what is found, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.errors import HostError, ImageError
from ringfence.image.find import ImageMissing, find
from ringfence.linux import paths

DIGITS = "0123456789abcdef" * 4


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory whose store has a record, called base and app:1."""
    store = tmp_path / "state/images"
    (store / "images").mkdir(parents=True)
    (store / "refs").mkdir()
    (store / f"images/sha256-{DIGITS}.json").write_text("{}")
    for name in ("base%3Alatest", "app%3A1"):
        (store / "refs" / name).symlink_to(f"../images/sha256-{DIGITS}.json")
    return tmp_path / "state"


@pytest.fixture(autouse=True)
def only_this_state(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGFENCE_STATE_DIR", str(state))


def test_base_is_the_default_and_its_digest_is_that_of_its_manifest(state: Path) -> None:
    """Without a reference the image is base; the link to its record says which one."""
    image = find(None, None, state_dir=str(state))
    assert (image.name, image.kind, image.digest) == ("base:latest", "store", f"sha256:{DIGITS}")
    assert image.path == str(state / f"images/images/sha256-{DIGITS}.json")
    assert image.state == str(state)


@pytest.mark.parametrize("ref", ["app:1", "docker://app:1"])
def test_an_image_is_found_as_its_users_write_it(state: Path, ref: str) -> None:
    assert find(ref, None, state_dir=str(state)).name == "app:1"


@pytest.mark.parametrize("target", ["", "sha256-12.json", "../../..", f"sha256-{DIGITS[:-1]}g.json", "/"])
def test_a_link_to_anything_but_a_record_is_no_image(state: Path, target: str) -> None:
    """A link that does not name a record by its digest is as good as none; the error says what to do."""
    link = state / "images/refs/base%3Alatest"
    link.unlink()
    if target:
        link.symlink_to(target)
    with pytest.raises(ImageError, match="ringfence image bootstrap base, or use --image host"):
        find("base", None, state_dir=str(state))


def test_a_name_without_its_record_is_no_image(state: Path) -> None:
    (state / f"images/images/sha256-{DIGITS}.json").unlink()
    with pytest.raises(ImageError, match="has not been built"):
        find("base", None, state_dir=str(state))


@pytest.mark.parametrize("name", ["python:3.12", "registry.example.com/team/app:1.2", "app:2"])
def test_a_name_that_is_not_here_may_be_fetched(state: Path, name: str) -> None:
    """The error says that it is missing, which is when `run` asks the registry."""
    with pytest.raises(ImageMissing, match="no image"):
        find(name, None, state_dir=str(state))


@pytest.mark.parametrize("name", ["", "Base", "../base", "base\n", "a b", "app:", "app@sha256:12"])
def test_a_name_that_no_image_can_have_is_refused_in_one_line(state: Path, name: str) -> None:
    with pytest.raises(ImageError) as refused:
        find(name, None, state_dir=str(state))
    assert not isinstance(refused.value, ImageMissing)
    assert "\n" not in str(refused.value)


def test_an_image_and_a_directory_together_are_refused(state: Path, tmp_path: Path) -> None:
    """Only one of --image and --rootfs can name the root."""
    with pytest.raises(ImageError, match="both"):
        find("base", str(tmp_path), state_dir=str(state))


def test_a_directory_is_found_through_the_users_own_symlink(state: Path, tmp_path: Path) -> None:
    """--rootfs may be a symlink; the image is the directory it leads to, and the digest says which."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    direct = find(None, str(root), state_dir=str(state))
    linked = find(None, str(tmp_path / "link"), state_dir=str(state))
    assert linked.path == direct.path == str(root)
    assert linked.digest == direct.digest
    assert direct.digest.startswith("rootfs:")
    (root / "new").touch()
    os.utime(root, ns=(1, 1))
    assert find(None, str(root), state_dir=str(state)).digest != direct.digest


@pytest.mark.parametrize(
    "given", ["/", "//", "/../", "/proc", "/proc/self", "/sys", "/dev", "/etc/passwd", "", "a\0b"]
)
def test_a_root_that_is_no_image_is_refused(state: Path, given: str) -> None:
    """The host's root, the kernel's file systems, files and nonsense cannot be a root."""
    with pytest.raises(ImageError, match="as a root"):
        find(None, given, state_dir=str(state))


def test_a_missing_root_is_refused(state: Path, tmp_path: Path) -> None:
    """A directory that does not exist is an error that shows the path."""
    with pytest.raises(ImageError, match=r"nowhere.*No such file"):
        find(None, str(tmp_path / "nowhere"), state_dir=str(state))


def test_our_own_state_cannot_be_a_root_but_a_layer_in_it_can(state: Path, tmp_path: Path) -> None:
    """Neither the state directory, nor one around it, nor one in it is a root; an unpacked layer is."""
    (state / "logs").mkdir()
    for given in (state, tmp_path, state / "logs"):
        with pytest.raises(ImageError, match="Ringfence's own"):
            find(None, str(given), state_dir=str(state))
    inside = state / f"images/layers/sha256-{DIGITS}/fs"
    inside.mkdir(parents=True)
    assert find(None, str(inside), state_dir=str(state)).path == str(inside)


def test_finding_an_image_imports_nothing_heavy() -> None:
    """`run` finds its image without msgspec, dataclasses, typing, pathlib, json, subprocess or OpenSSL."""
    program = (
        "import sys; from ringfence.image.find import find; from ringfence.linux import paths\n"
        "find('host', None, state_dir='/nonexistent')\n"
        "heavy = {'msgspec', 'dataclasses', 'typing', 'pathlib', 'json', 'subprocess', '_hashlib', 're'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-SIc", _with_source(program)], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def _with_source(program: str) -> str:
    source = Path(paths.__file__).parents[2]
    return f"import sys; sys.path.insert(0, {str(source)!r})\n{program}"


def test_the_state_directory_is_made_searchable_for_mapped_users_and_writable_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new state directory belongs to us, whatever the umask; the same for the run directory."""
    monkeypatch.setenv("RINGFENCE_STATE_DIR", str(tmp_path / "a/state"))
    monkeypatch.setenv("RINGFENCE_RUN_DIR", str(tmp_path / "b/run"))
    before = os.umask(0)
    try:
        made = [paths.state_dir(), paths.run_dir()]
    finally:
        os.umask(before)
    assert made == [str(tmp_path / "a/state"), str(tmp_path / "b/run")]
    expected = 0o711 if os.geteuid() == 0 else 0o700
    assert [os.stat(path).st_mode & 0o7777 for path in made] == [expected, expected]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o733, 0o1777])
def test_a_state_directory_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Whoever could write there could plant an image: refused, with the mode in the message."""
    planted = tmp_path / "planted"
    planted.mkdir()
    planted.chmod(mode)
    monkeypatch.setenv("RINGFENCE_STATE_DIR", str(planted))
    with pytest.raises(HostError, match=f"writable by others .mode {mode:04o}"):
        paths.state_dir()


def test_a_symlink_or_a_file_is_no_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory itself must be one: a symlink could have been planted, a file cannot hold anything."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        monkeypatch.setenv("RINGFENCE_STATE_DIR", str(tmp_path / name))
        with pytest.raises(HostError, match="is not a directory"):
            paths.state_dir()


def test_a_relative_or_foreign_state_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path depends on the working directory; another user's directory is not to be trusted."""
    monkeypatch.setenv("RINGFENCE_STATE_DIR", "state")
    with pytest.raises(HostError, match="absolute"):
        paths.state_dir()
    monkeypatch.setenv("RINGFENCE_STATE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    with pytest.raises(HostError, match="belongs to user"):
        paths.state_dir()


def test_a_user_sees_roots_images_too_unless_he_chose_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """With default paths a user looks in his own state directory, then in root's."""
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    assert paths.image_states("/mine") == ("/mine",)
    monkeypatch.delenv("RINGFENCE_STATE_DIR")
    assert paths.image_states("/mine") == ("/mine", paths.ROOT_STATE)
