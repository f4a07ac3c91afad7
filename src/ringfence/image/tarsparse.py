"""The maps of sparse files in tar archives: GNU's old format and its three ways of writing one in pax headers.

Source: "Storing Sparse Files" in the GNU tar manual.
"""

from ringfence.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class _Stream(Protocol):
        def read(self, size: int) -> bytes: ...


_BLOCK = 512
_PAIR = 24  # two numbers of twelve bytes each
_MOST_DIGITS = 20


class SparseMap:
    """Where the stored bytes of a file belong: pairs of offset and length."""

    __slots__ = ("pairs",)

    def __init__(self, pairs: list[tuple[int, int]]) -> None:
        """Hold the pairs; `check` judges them."""
        self.pairs = pairs

    def check(self, size: int, stored: int) -> None:
        """Raise ImageError unless the pairs are in order, inside `size` bytes, and `stored` bytes together."""
        end = total = 0
        for offset, length in self.pairs:
            if offset < end or offset + length > size:
                raise ImageError("its map of holes is out of order or leaves the file")
            end = offset + length
            total += length
        if total != stored:
            raise ImageError(f"its map of holes places {total} bytes of {stored}")


def old_gnu_map(
    header: bytes, stream: "_Stream", number: "Callable[[bytes, str], int]", most_bytes: int
) -> SparseMap:
    """Read the map that begins in a header of type "S" and goes on in blocks of its own behind it."""
    pairs: list[tuple[int, int]] = []
    field, more = header[386 : 386 + 4 * _PAIR], header[482]
    while True:
        for at in range(0, len(field), _PAIR):
            if not field[at]:  # NUL: the rest is unused
                break
            pairs.append((number(field[at : at + 12], "offset"), number(field[at + 12 : at + 24], "length")))
        if not more:
            return SparseMap(pairs)
        most_bytes -= _BLOCK
        block = stream.read(_BLOCK)
        if len(block) < _BLOCK or most_bytes < 0:
            raise ImageError("its map of holes is cut off or too long")
        field, more = block[: 21 * _PAIR], block[504]


def pax_map(records: dict[bytes, bytes], repeated: list[bytes]) -> SparseMap:
    """Read the map of the formats 0.1, one record with commas, and 0.0, which repeats records."""
    numbers = records[b"GNU.sparse.map"].split(b",") if b"GNU.sparse.map" in records else repeated
    return _pairs([part for part in numbers if part] if numbers == [b""] else numbers)


def map_in_data(stream: "_Stream", stored: int, most_bytes: int) -> tuple[SparseMap, int]:
    """Read the map of the format 1.0, lines before the data; return it and how many bytes it took."""
    lines: list[bytes] = []
    rest, taken, wanted = b"", 0, 1
    while len(lines) < wanted:
        block = stream.read(_BLOCK)
        taken += _BLOCK
        if taken > min(stored, most_bytes) or len(block) < _BLOCK or len(rest) > _MOST_DIGITS:
            raise ImageError("its map of holes is cut off or too long")
        *whole, rest = (rest + block).split(b"\n")
        if whole and not lines:
            wanted = 1 + 2 * _count(whole[0])
        lines += whole
    return _pairs(lines[1:wanted]), taken


def _count(text: bytes) -> int:
    if not text.isdigit() or len(text) > _MOST_DIGITS:
        raise ImageError("its map of holes is broken")
    return int(text)


def _pairs(numbers: list[bytes]) -> SparseMap:
    values = [_count(text) for text in numbers]
    if len(values) % 2:
        raise ImageError("its map of holes is broken")
    return SparseMap(list(zip(values[::2], values[1::2], strict=True)))
