"""Which modules of a kernel a guest has to load, and in which order: read from the modules themselves.

A package that is not installed has no ``modules.dep``: depmod writes that at installation. But every module says
which others it needs.
"""

import lzma
import os
import zlib

from ringfence.errors import HostError
from ringfence.runtime.microvm.kernels.elf import MOST_MODULE_BYTES, module_needs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# The machine's devices, the link, the image, and what lies over it; the other names are good to have.
NEEDED = ("virtio_mmio", "virtio_console", "virtio_blk", "erofs", "overlay")
WELCOME = ("virtio_rng",)
EXTRAS = {"vsock": ("vmw_vsock_virtio_transport",), "net": ("virtio_net",)}


class Tree:
    """The modules of one kernel below ``lib/modules/RELEASE``."""

    def __init__(self, directory: str) -> None:
        """Look where they lie; raises HostError when there is no such directory."""
        self._files = dict(_found(directory))
        self._builtin = _builtin(os.path.join(directory, "modules.builtin"))
        self._content: dict[str, bytes] = {}
        self.directory = directory

    def order(self, wanted: "Iterable[str]", *, optional: bool = False) -> list[str]:
        """Return the names of modules that have to be loaded for all of `wanted`, what they need first.

        What is built in needs none. Raises HostError when a driver is not there at all, unless `optional`.
        """
        done: list[str] = []
        for name in wanted:
            if name in self._files or not optional:
                self._visit(name, done, ())
        return done

    def _visit(self, name: str, done: list[str], on_the_way: tuple[str, ...]) -> None:
        if name in done or (name not in self._files and name in self._builtin):
            return
        if name not in self._files:
            raise HostError(f"the kernel of {self.directory} has no {name}")
        if name in on_the_way:
            raise HostError(f"the module {name} in {self.directory} needs itself")
        try:
            needs = module_needs(self.content(name))
        except ValueError as error:
            raise HostError(f"{self._files[name]}: {error}") from error
        for needed in needs:
            self._visit(needed.replace("-", "_"), done, (*on_the_way, name))
        done.append(name)

    def content(self, name: str) -> bytes:
        """Return the uncompressed file of a module; raises HostError."""
        if name not in self._content:
            self._content[name] = _read(self._files[name])
        return self._content[name]


def collect(directory: str, target: str) -> "tuple[tuple[str, ...], dict[str, tuple[str, ...]]]":
    """Copy what a guest needs from ``lib/modules/RELEASE`` to the new directory `target`, uncompressed.

    Return the file names in the order of loading, and those to load after them for each of EXTRAS. Raises HostError.
    """
    tree = Tree(directory)
    main = tree.order(NEEDED)
    main += [name for name in tree.order(WELCOME, optional=True) if name not in main]
    extras = {
        purpose: [name for name in tree.order(wanted, optional=True) if name not in main]
        for purpose, wanted in EXTRAS.items()
    }
    os.mkdir(target, 0o755)
    for name in {*main, *(name for more in extras.values() for name in more)}:
        with open(os.path.join(target, f"{name}.ko"), "wb") as file:
            file.write(tree.content(name))
    return _file_names(main), {purpose: _file_names(more) for purpose, more in extras.items() if more}


def _file_names(modules: "Iterable[str]") -> tuple[str, ...]:
    return tuple(f"{name}.ko" for name in modules)


def _found(directory: str) -> "Iterable[tuple[str, str]]":
    kernel = os.path.join(directory, "kernel")
    if not os.path.isdir(kernel):
        raise HostError(f"there are no modules in {directory}")
    for home, _, files in os.walk(kernel):
        for file in files:
            name, dot, kind = file.partition(".ko")
            if dot and kind in ("", ".xz", ".gz", ".zst"):
                yield name.replace("-", "_"), os.path.join(home, file)


def _builtin(path: str) -> frozenset[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        paths = file.read(1 << 20).split()
    return frozenset(os.path.basename(path).removesuffix(".ko").replace("-", "_") for path in paths)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        packed = file.read(MOST_MODULE_BYTES + 1)
    most = MOST_MODULE_BYTES + 1
    try:
        if path.endswith(".xz"):
            data = lzma.LZMADecompressor().decompress(packed, most)
        elif path.endswith(".gz"):
            data = zlib.decompressobj(wbits=31).decompress(packed, most)
        elif path.endswith(".zst"):
            data = _zstd(packed, most)
        else:
            data = packed
    except (lzma.LZMAError, zlib.error, ValueError) as error:
        raise HostError(f"{path} cannot be unpacked: {error}") from error
    if len(data) > MOST_MODULE_BYTES:
        raise HostError(f"{path} has more than {MOST_MODULE_BYTES >> 20} MiB")
    return data


def _zstd(packed: bytes, most: int) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
            return reader.read(most)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
