"""Frames on a stream."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.connectors.iso8583.framing import FrameError, FrameReader, Framing

FRAMINGS = [
    Framing(),
    Framing(length_includes_itself=True),
    Framing("binary", 4, header=b"\x60\x00\x01\x00\x00"),
    Framing("ascii", 4),
    Framing("ascii", 4, length_includes_itself=True, header=b"ISO026000070"),
    Framing("bcd", 2, frame_bytes_max=4096),
    Framing(header=b"\0\0", length_includes_header=False),
    Framing(length_includes_itself=True, header=b"\0\0", length_includes_header=False),
]


@pytest.mark.parametrize("framing", FRAMINGS)
@settings(max_examples=50)
@given(data=st.data())
def test_messages_come_whole_however_the_stream_is_cut(
    framing: Framing, data: st.DataObject
) -> None:
    messages = data.draw(st.lists(st.binary(min_size=1, max_size=300), max_size=6))
    stream = b"".join(framing.pack(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader(framing)
    seen: list[bytes] = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        seen += reader.feed(stream[begin:end])
    assert seen == messages


@pytest.mark.parametrize("framing", FRAMINGS)
@settings(max_examples=50)
@given(parts=st.lists(st.binary(max_size=200), max_size=8))
def test_garbage_is_refused_or_waited_for_and_never_kept_beyond_a_frame(
    framing: Framing, parts: list[bytes]
) -> None:
    reader = FrameReader(framing)
    fed = 0
    try:
        for part in parts:
            fed += len(part)
            for message in reader.feed(part):
                assert 0 < len(message) <= framing.frame_bytes_max
                fed -= len(message)
            assert len(reader._buffer) <= framing.length_bytes + framing.frame_bytes_max
    except FrameError:
        pass
    assert fed >= 0


def test_binary_length_is_big_endian_and_counts_the_header_unless_told_otherwise() -> None:
    assert Framing().pack(b"0800") == b"\x00\x040800"
    assert Framing(length_includes_itself=True).pack(b"0800") == b"\x00\x060800"
    assert Framing(header=b"\x60\0\1\0\0").pack(b"0800") == b"\x00\x09\x60\0\1\0\x000800"
    reserved = Framing(header=b"\0\0", length_includes_header=False)
    assert reserved.pack(b"0800") == b"\x00\x04\0\x000800"
    assert FrameReader(reserved).feed(b"\0\0\0\0" + reserved.pack(b"0800")) == [b"0800"]
    assert Framing("ascii", 4).pack(b"0800") == b"00040800"
    assert Framing("bcd").pack(b"0" * 128) == b"\x01\x28" + b"0" * 128


def test_empty_frame_keeps_the_line_alive_and_is_no_message() -> None:
    framing = Framing()
    assert FrameReader(framing).feed(b"\0\0" + framing.pack(b"0800") + b"\0\0") == [b"0800"]


def test_what_is_longer_than_a_frame_may_be_is_refused_at_its_length() -> None:
    framing = Framing(frame_bytes_max=100)
    with pytest.raises(FrameError):
        FrameReader(framing).feed(b"\x00\x65")
    with pytest.raises(FrameError):
        framing.pack(b"0" * 101)
    with pytest.raises(FrameError):
        FrameReader(Framing(length_includes_itself=True)).feed(b"\x00\x01")
    with pytest.raises(FrameError):
        FrameReader(Framing("ascii", 4)).feed(b"00x4")
