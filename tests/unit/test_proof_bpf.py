"""The proof's reading of seccomp filters: rare instructions, and programs that no kernel would take."""

import struct

import pytest

from ringfence.proof.bpf import answer, read_program


def program(*instructions):
    return read_program(b"".join(struct.pack("<HBBI", *instruction) for instruction in instructions))


def run(*instructions, number=7, args=()):
    return answer(program(*instructions), number, 0xC000003E, args)


def test_a_call_is_seen_as_the_kernel_shows_it():
    """Number, architecture and both halves of each argument lie where struct seccomp_data has them."""
    for offset, word in ((0, 7), (4, 0xC000003E), (16, 0x2), (20, 0x1), (56, 0x9), (60, 0)):
        assert run((0x20, 0, 0, offset), (0x16, 0, 0, 0), args=(0x1_0000_0002, 0, 0, 0, 0, 9)) == word


def test_arithmetic_stays_within_a_word():
    assert run((0x00, 0, 0, 0xFFFFFFFF), (0x04, 0, 0, 2), (0x16, 0, 0, 0)) == 1
    assert run((0x00, 0, 0, 1), (0x14, 0, 0, 2), (0x16, 0, 0, 0)) == 0xFFFFFFFF
    assert run((0x00, 0, 0, 0x80000001), (0x64, 0, 0, 1), (0x16, 0, 0, 0)) == 2
    assert run((0x00, 0, 0, 1), (0x84, 0, 0, 0), (0x16, 0, 0, 0)) == 0xFFFFFFFF


def test_memory_and_the_index_register():
    """Stored words come back through A and X."""
    store = ((0x00, 0, 0, 5), (0x02, 0, 0, 3), (0x61, 0, 0, 3), (0x87, 0, 0, 0), (0x16, 0, 0, 0))
    assert run(*store) == 5
    assert run((0x00, 0, 0, 4), (0x07, 0, 0, 0), (0x0C, 0, 0, 0), (0x16, 0, 0, 0)) == 8


def test_jumps():
    jump = (0x20, 0, 0, 0), (0x45, 0, 1, 4), (0x06, 0, 0, 1), (0x06, 0, 0, 2)
    assert run(*jump, number=4) == 1
    assert run(*jump, number=3) == 2
    assert run((0x05, 0, 0, 1), (0x06, 0, 0, 1), (0x06, 0, 0, 2)) == 2


@pytest.mark.parametrize("instruction", [(0xFF, 0, 0, 0), (0x94, 0, 0, 1), (0x30, 0, 0, 0)])
def test_what_no_seccomp_filter_does_is_an_error(instruction):
    """An answer that cannot be worked out is no answer, and the control then counts as not observed."""
    with pytest.raises(ValueError, match="in a seccomp filter"):
        run(instruction, (0x06, 0, 0, 0))


def test_a_filter_without_an_end_or_a_whole_number_of_instructions():
    with pytest.raises(ValueError, match="ends without"):
        run((0x00, 0, 0, 0))
    for data in (b"", b"1234567"):
        with pytest.raises(ValueError, match="bytes"):
            read_program(data)
