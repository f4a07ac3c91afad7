"""``ringfence doctor``: what this host can enforce and how, what is missing, and what to do about it."""

import os
import sys

from ringfence.errors import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.host.checks import Check
    from ringfence.host.enforce import Enforcement
    from ringfence.host.facts import Host

_COLOURS = {"ok": "\033[32m", "warn": "\033[33m", "missing": "\033[31m", "no": "\033[31m"}
_EXAMPLE = "example: ringfence doctor --matrix"


def main(argv: list[str]) -> int:
    """Print the report; exit status 0 if the tier can run here, 1 otherwise, 2 for a bad command line."""
    options = _parser().parse_args(argv)
    from ringfence.host.checks import checks, ready
    from ringfence.host.enforce import TIERS, matrix

    host = _detected()
    found = checks(host, options.isolation or "linux")
    good = ready(found)
    tiers = (options.isolation,) if options.isolation else TIERS
    cells = tuple(cell for cell in matrix(host) if cell.tier in tiers)
    if options.json:
        import msgspec

        shown: dict[str, object] = {"isolation": options.isolation or "linux", "ready": good}
        shown |= {"matrix": cells} if options.matrix else {"checks": found, "host": host}
        print(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())
    elif options.matrix:
        print("\n".join(matrix_lines(cells, colour=_colour())))
    else:
        print("\n".join(check_lines(found, colour=_colour())))
        print(f"\nThe {options.isolation or 'linux'} tier can{'' if good else 'not'} run here.")
    return 0 if good else 1


def _detected() -> "Host":
    """Return the facts as they are now: nothing kept is believed, and nothing is kept."""
    from msgspec.structs import replace

    from ringfence.host.detect import detect
    from ringfence.host.gvisor import gvisor_facts
    from ringfence.host.machine import QEMU
    from ringfence.host.vmm import vmm_facts

    host = detect()
    vmm = vmm_facts(host) if QEMU in host.runtimes else None
    return replace(host, gvisor=gvisor_facts(host), vmm=vmm)


def check_lines(found: "tuple[Check, ...]", *, colour: bool) -> list[str]:
    """Return the aligned lines of a report; what to do stands below what was found."""
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        lines.append(f"{_paint(check.level, 8, colour)}{check.name:{width}}  {one_line(check.found)}")
        if check.advice:
            lines.append(f"{'':{8 + width}}  -> {one_line(check.advice)}")
    return lines


def matrix_lines(cells: "tuple[Enforcement, ...]", *, colour: bool) -> list[str]:
    """Return the table field by field; a tier that enforces nothing for one reason is one line at the end."""
    by_tier: dict[str, list[Enforcement]] = {}
    for cell in cells:
        by_tier.setdefault(cell.tier, []).append(cell)
    width = max(len(cell.field) for cell in cells)
    lines: list[str] = []
    last: list[str] = []
    for tier, column in by_tier.items():
        reasons = {cell.reason for cell in column}
        if len(reasons) == 1 and not column[0].enforced:
            last.append(f"{tier}: {one_line(reasons.pop())}")
            continue
        lines += ["", f"{tier}:"] if lines else [f"{tier}:"]
        lines += [line for cell in column for line in _cell_lines(cell, width, colour)]
    return [*lines, "", *last] if lines and last else lines or last


def _cell_lines(cell: "Enforcement", width: int, colour: bool) -> list[str]:
    level = "ok" if cell.enforced else "no"
    lines = [f"  {_paint(level, 4, colour)}{cell.field:{width}}  {one_line(cell.mechanism or cell.reason)}"]
    return lines if cell.enforced else [*lines, f"{'':{6 + width}}  -> {one_line(cell.hint)}"]


def _paint(level: str, width: int, colour: bool) -> str:
    text = f"{level:{width}}"
    return f"{_COLOURS[level]}{text}\033[0m" if colour else text


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _parser() -> "argparse.ArgumentParser":
    import argparse

    parser = argparse.ArgumentParser(
        prog="ringfence doctor", description="Say what this host can enforce and how.", epilog=_EXAMPLE
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--matrix", action="store_true", help="print which mechanism enforces each policy field"
    )
    parser.add_argument(
        "-i",
        "--isolation",
        metavar="TIER",
        choices=("linux", "gvisor", "microvm"),
        help="linux (the default), gvisor or microvm",
    )
    return parser
