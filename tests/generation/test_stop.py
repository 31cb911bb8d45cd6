"""Stop strings: found wherever tokens end, and never shown in part.

pytest tests/generation/test_stop.py
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgpt.generation.stop import StopStrings, TextStream
from flashgpt.tokenizer import EOS, Tokenizer

FEW = st.text("ab\u00e9\U0001f642", max_size=30)  # so that stop strings are met, in part and whole
STOPS = st.lists(st.text("ab\u00e9\U0001f642", min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small BPE, whose tokens are of several bytes and end anywhere."""
    return Tokenizer.train(["ab aab \u00e9a\u00e9 b\U0001f642a abab " * 20], 300)


def by_definition(text: bytes, stops: list[bytes]) -> tuple[bytes, bool]:
    """The text before the stop string that is complete first; all of it if there is none."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


def cut(data: st.DataObject, whole: bytes) -> list[bytes]:
    """`whole`, in pieces that end at any byte."""
    places = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=12)))
    ends = [0, *places, len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(ends)]


@given(data=st.data(), text=FEW, stops=STOPS)
@settings(max_examples=400, deadline=None)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    data: st.DataObject, text: str, stops: list[str]
) -> None:
    wanted = [stop.encode() for stop in stops]
    expected, stopped = by_definition(text.encode(), wanted)
    search, shown, done = StopStrings(wanted), b"", False
    for piece in cut(data, text.encode()):
        more, done = search.push(piece)
        shown += more
        assert expected.startswith(shown)  # nothing is taken back
        if done:
            break
    assert done is stopped
    assert shown + search.flush() == expected


@given(data=st.data(), text=FEW, stops=STOPS)
@settings(max_examples=200, deadline=None)
def test_no_byte_is_held_back_without_need(
    data: st.DataObject, text: str, stops: list[str]
) -> None:
    """What is not shown yet is the beginning of a stop string."""
    wanted = [stop.encode() for stop in stops]
    search, seen, shown = StopStrings(wanted), b"", b""
    for piece in cut(data, text.encode()):
        more, done = search.push(piece)
        if done:
            return
        seen, shown = seen + piece, shown + more
        held = seen[len(shown) :]
        assert seen == shown + held
        assert not held or any(stop.startswith(held) for stop in wanted)


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["x one", " tw", "o three"], ["one two"], "x "),  # spans three tokens
        (["end\nnext"], ["\n"], "end"),  # inside a token
        (["aab"], ["ab"], "a"),  # a false start before it
        (["ab", "cd"], ["abcde", "cd"], "ab"),  # complete first, begun later
        (["abcd"], ["cd", "bcd"], "a"),  # complete together
        (["abc"], ["abcd"], "abc"),  # never complete
    ],
)
def test_cases_by_hand(pieces: list[str], stops: list[str], text: str) -> None:
    search, shown = StopStrings(stop.encode() for stop in stops), b""
    for piece in pieces:
        more, done = search.push(piece.encode())
        shown += more
        if done:
            break
    assert (shown + search.flush()).decode() == text


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_streamed_pieces_are_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    token = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(token, max_size=30) | st.text(max_size=20).map(tokenizer.encode))
    stops = data.draw(STOPS)
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)
    stream, pieces = TextStream(tokenizer, stops), []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        if stream.stopped:
            break
    raw = b"".join(tokenizer.token_bytes[token_id] for token_id in ids)
    before, stopped = by_definition(raw, [stop.encode() for stop in stops])
    assert stream.stopped is stopped
    assert "".join([*pieces, stream.flush()]) == before.decode(errors="replace")


def test_a_character_comes_when_it_is_whole() -> None:
    stream = TextStream(Tokenizer.bytes())
    pieces = [stream.push(byte) for byte in "\U0001f642!".encode()]
    assert pieces == ["", "", "", "\U0001f642", "!"]
    assert stream.push(0xF0) == "" and stream.flush() == "\ufffd"


def test_a_special_token_is_no_text() -> None:
    tokenizer = Tokenizer.bytes()
    stream = TextStream(tokenizer, [EOS])
    assert stream.push(tokenizer.eos_id) == "" and not stream.stopped


@pytest.mark.parametrize("token", [-1, 257])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match=rf"token id must be in \[0, 257\), got {token}"):
        TextStream(Tokenizer.bytes()).push(token)
