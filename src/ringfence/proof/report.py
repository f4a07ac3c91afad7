"""A proof as a table for people."""

from __future__ import annotations

from ringfence.errors import one_line
from ringfence.proof.prove import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.proof.prove import Line, Proof

_WIDEST = 44
# The processes that a sandbox with a kernel of its own consists of: each has its own lines, after those of the job.
_PARTS = ("sentry", "gofer", "door")


def table(proof: Proof) -> str:
    """Return the proof, one line a control, with a verdict on top."""
    head = [
        f"proof of {proof['sandbox']} ({proof['isolation']}, {one_line(proof['runtime'])}): {_verdict(proof)}",
        f"  taken {proof['taken_at']}, {proof['moment']}",
        f"  policy {proof['policy_digest'][:19]}  image {one_line(proof['image'])} {proof['image_digest'][:19]}",
    ]
    if proof["unenforced"]:
        head.append(f"  allowed to go unenforced: {', '.join(proof['unenforced'])}")
    lines = sorted(proof["lines"], key=_part)
    rows = [("", "control", "asked", "observed", "vantage")]
    rows += [
        (
            _mark(line),
            one_line(line["control"]),
            _cell(words(line["asked"])),
            _cell(_observed(line)),
            line["vantage"],
        )
        for line in lines
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    body = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    # From the end, so that what is inserted does not move what is still to come.
    for place in range(len(lines) - 1, 0, -1):
        if _part(lines[place]) != _part(lines[place - 1]):
            body.insert(place + 1, "")
    return "\n".join(head + body)


def _verdict(proof: Proof) -> str:
    if not proof["holds"]:
        return "NOT every asked control was observed"
    reported = sum(line["vantage"] == "reported" for line in proof["lines"])
    return "every asked control was observed" + (f", {reported} of them only reported" if reported else "")


def _part(line: Line) -> int:
    part = line["control"].partition(".")[0]
    return _PARTS.index(part) + 1 if part in _PARTS else 0


def _mark(line: Line) -> str:
    return {True: "ok", False: "NO", None: "--"}[line["ok"]]


def _observed(line: Line) -> str:
    asked, observed = line["asked"], line["observed"]
    if line["ok"] and observed == asked:
        return "the same"
    if not line["source"] and line["ok"] is not None:
        return "nothing"
    if isinstance(asked, list) and isinstance(observed, list) and asked:
        return _difference(asked, observed)
    return words(observed)


def _difference(asked: list[str], observed: list[str]) -> str:
    """Say how a list differs: two long ones that begin alike would look the same when they are cut."""
    more = ", ".join(word for word in observed if word not in asked)
    less = ", ".join(word for word in asked if word not in observed)
    if not more and not less:
        return words(observed)  # another order, or something twice
    return "; ".join(
        text for text in (f"also {more}" if more else "", f"without {less}" if less else "") if text
    )


def _cell(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 1] + "…"
