"""How much an archive from outside may ask for."""

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The bounds of one layer; what passes one ends in one ImageError, and nothing of the layer stays.

    entries         names in the archive, and compressed members or frames around it
    unpacked_bytes  of all files together (a sparse file counts whole), and of the uncompressed archive
    ratio           times that the compressed size which it may grow to, once it is above `ratio_from_bytes`;
                    deflate reaches 1000 with zeros, programs and data stay far below 20
    header_bytes    of one extended header (long names, attributes, sparse maps); as in Go's archive/tar
    """

    entries: int = 1_000_000
    unpacked_bytes: int = 64 << 30
    ratio: int = 100
    ratio_from_bytes: int = 1 << 30
    header_bytes: int = 1 << 20

    def ceiling(self, compressed_bytes: int) -> int:
        """Return how many bytes a blob of this size may become."""
        return min(self.unpacked_bytes, max(self.ratio_from_bytes, self.ratio * compressed_bytes))


DEFAULT = Limits()
