"""``ringfence image``: bring images here, look at them, check them, remove them."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

EXAMPLE = """examples:
  ringfence image pull python:3.12-slim
  ringfence image bootstrap debian:bookworm --include python3   # from Debian packages, without a registry
  ringfence image import ./rootfs my-image
  ringfence image ls
  ringfence image export my-image oci-archive:my-image.tar
"""


def main(argv: list[str]) -> int:
    """Run ``ringfence image ARGS`` and return its exit status; raises RingfenceError."""
    args = _parser().parse_args(argv)
    if args.command == "pull":
        from ringfence.cli.image_pull import pull

        return pull(args)
    if args.command in ("import", "bootstrap", "export"):
        from ringfence.cli import image_make as verbs
    else:
        from ringfence.cli import image_store as verbs  # type: ignore[no-redef]
    status: int = getattr(verbs, f"{args.command}_")(args)
    return status


def _parser() -> "argparse.ArgumentParser":
    import argparse

    from ringfence.cli.image_pull import add_parser as add_pull
    from ringfence.cli.parser import Parser

    parser = Parser(
        prog="ringfence image",
        description="Bring images here, look at them, check them, remove them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(  # type: ignore[assignment]
        dest="command", required=True, metavar="COMMAND"
    )
    add_pull(commands)
    _add_makers(commands)
    _add_lookers(commands)
    return parser


def _add_makers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    brought = commands.add_parser(
        "import", help="make an image of a directory, a tar or another tool's image"
    )
    brought.add_argument(
        "source",
        metavar="SOURCE",
        help="DIR, TAR (plain, gzip, zstd), - for a tar on standard input; or an image: oci:DIR[:TAG], "
        "oci-archive:FILE, docker-archive:FILE, containers-storage:NAME",
    )
    brought.add_argument(
        "name", nargs="?", metavar="NAME", help="what to call it here; needed for DIR and TAR"
    )
    brought.add_argument("--platform", default="", metavar="OS/ARCH", help="default: this host's")
    brought.add_argument("--json", action="store_true", help="print the image's record")
    boot = commands.add_parser("bootstrap", help="build an image from Debian packages, unless it is there")
    boot.add_argument("what", metavar="WHAT", help="base, or debian:bookworm, debian:trixie")
    boot.add_argument("--suite", default="auto", help="for base: bookworm or trixie; default: this host's")
    boot.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PACKAGES",
        help="more packages, separated by commas",
    )
    boot.add_argument("--name", metavar="NAME", help="what to call it; default: WHAT")
    boot.add_argument("--force", action="store_true", help="build it anew")
    boot.add_argument("--json", action="store_true", help="print the image's record")
    export = commands.add_parser("export", help="write an image as an OCI layout")
    export.add_argument("name", metavar="NAME")
    export.add_argument("target", metavar="TARGET", help="oci:DIR[:TAG] or oci-archive:FILE[:TAG]")
    export.add_argument("--json", action="store_true", help="print what was written")


def _add_lookers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    for command, text in (
        ("ls", "list the images"),
        ("inspect", "print everything known about an image, as JSON"),
        ("history", "show how an image was built"),
        ("rm", "remove names, and images that have no other"),
        ("prune", "remove images without a name, and what no image needs any more"),
        ("verify", "hash every blob again and compare unpacked layers with their archives"),
    ):
        verb = commands.add_parser(command, help=text)
        if command in ("inspect", "history"):
            verb.add_argument("name", metavar="NAME", help="name, digest, or the beginning of a digest")
        elif command == "rm":
            verb.add_argument(
                "names", nargs="+", metavar="NAME", help="name, digest, or beginning of a digest"
            )
        elif command == "verify":
            verb.add_argument("names", nargs="*", metavar="NAME", help="default: all")
        verb.add_argument("--json", action="store_true", help="print JSON")
