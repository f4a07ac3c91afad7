"""Run a command that sees layers mounted over each other.

``python -m ringfence.image.stack PLACE LAYER... -- COMMAND``, for a mount namespace of its own (unshare --mount):
PLACE/root shows the layers, read-only, the first at the bottom.
"""

import os
import sys

from ringfence.linux import libc


def main(argv: list[str]) -> None:
    """Mount and become the command; raises OSError."""
    border = argv.index("--")
    place, *layers = argv[:border]
    os.chdir(place)  # names relative to it are short: all must fit into one page
    names = [str(position) for position in range(len(layers))]
    for name, layer in zip(names, layers, strict=True):
        os.symlink(layer, name)
    os.mkdir("empty", 0o755)  # overlayfs wants two layers
    os.mkdir("root", 0o755)
    if names:
        lower = ":".join([*reversed(names), "empty"])
        flags = libc.MS_RDONLY | libc.MS_NOSUID | libc.MS_NODEV
        data = f"lowerdir={lower},redirect_dir=nofollow,metacopy=off"
        libc.mount(
            "overlay",
            "root",
            "overlay",
            flags,
            data + (",userxattr" if os.environ.get("OVERLAY_USER") else ""),
        )
    os.execvp(argv[border + 1], argv[border + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])
