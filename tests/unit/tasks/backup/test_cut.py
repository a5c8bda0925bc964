"""A stream in chunks: the same bytes, each chunk full but the last, however the pieces come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from tasks.backup.writer import cut

SIZE = 20_000
LENGTHS = some.sampled_from([0, 1, 7, 4095, 4096, 4097, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE])


@given(lengths=some.lists(LENGTHS, max_size=30))
def test_chunks_are_the_stream_and_full_but_the_last(lengths: list[int]) -> None:
    stream = bytes(number % 251 for number in range(sum(lengths)))
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    pieces = [stream[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    chunks = list(cut(iter(pieces), SIZE))
    assert b"".join(chunks) == stream
    assert all(len(chunk) == SIZE for chunk in chunks[:-1]) and all(0 < len(chunk) <= SIZE for chunk in chunks)
