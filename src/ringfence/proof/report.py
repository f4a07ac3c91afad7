"""A proof as a table for people."""

from __future__ import annotations

from ringfence.errors import one_line
from ringfence.proof.prove import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.proof.prove import Line, Proof

_WIDEST = 44


def table(proof: Proof) -> str:
    """Return the proof, one line a control, with a verdict on top."""
    verdict = "every asked control was observed" if proof["holds"] else "NOT every asked control was observed"
    head = [
        f"proof of {proof['sandbox']} ({proof['isolation']}, {one_line(proof['runtime'])}): {verdict}",
        f"  taken {proof['taken_at']}, {proof['moment']}",
        f"  policy {proof['policy_digest'][:19]}  image {one_line(proof['image'])} {proof['image_digest'][:19]}",
    ]
    if proof["unenforced"]:
        head.append(f"  allowed to go unenforced: {', '.join(proof['unenforced'])}")
    rows = [("", "control", "asked", "observed", "vantage")]
    rows += [
        (_mark(line), line["control"], _cell(words(line["asked"])), _cell(_observed(line)), line["vantage"])
        for line in proof["lines"]
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    body = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(head + body)


def _mark(line: Line) -> str:
    return {True: "ok", False: "NO", None: "--"}[line["ok"]]


def _observed(line: Line) -> str:
    if line["ok"] and line["observed"] == line["asked"]:
        return "the same"
    return words(line["observed"]) if line["source"] or line["ok"] is None else "nothing"


def _cell(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"
