"""Where a text ends: stop strings, found on its bytes, so that tokens need not end where they do.

The text ends before the stop string that is complete first; of several complete with the same byte,
before the one that began first. Bytes that may yet turn out to belong to one are held back, so what
is shown never has to be taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from flashgpt.tokenizer import Tokenizer, utf8


class StopStrings:
    """Looks for stop strings in bytes as they come.

    Args:
        stops: UTF-8 of each stop string, none of them empty.
    """

    def __init__(self, stops: Iterable[bytes]) -> None:
        self._stops = tuple(stops)
        assert all(self._stops), "a stop string is not empty"
        self._held = b""

    def push(self, new: bytes) -> tuple[bytes, bool]:
        """The bytes that can be shown after `new`, and whether a stop string is complete.

        Once one is, the rest of `new` is not looked at.
        """
        if not self._stops:
            return new, False
        held = self._held
        for value in new:
            held += bytes((value,))
            if ended := [len(stop) for stop in self._stops if held.endswith(stop)]:
                self._held = b""
                return held[: len(held) - max(ended)], True
        keep = max(_begun(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> bytes:
        """What was held back and is text after all, because the text has ended."""
        held, self._held = self._held, b""
        return held


def _begun(held: bytes, stop: bytes) -> int:
    """How many bytes at the end of `held` are the beginning of `stop`, and not all of it."""
    for length in range(min(len(held), len(stop) - 1), 0, -1):
        if held.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """Turns ids into text as they come: whole characters, and no part of a stop string.

    The pieces together are `tokenizer.decode` of all ids, up to the stop string.

    Args:
        stops: stop strings, none of them empty.

    Raises:
        ValueError: a stop string with half a character.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()) -> None:
        self._table = tokenizer.token_bytes
        self._stops = StopStrings(map(utf8, stops))
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that can be shown after one more id; often "".

        Raises:
            ValueError: the id is outside [0, vocab_size).
        """
        if not 0 <= token < len(self._table):
            raise ValueError(f"token id must be in [0, {len(self._table)}), got {token}")
        shown, self.stopped = self._stops.push(self._table[token])
        return self._decoder.decode(shown)

    def flush(self) -> str:
        """The end of the text: what was held back; U+FFFD if a character was left unfinished."""
        return self._decoder.decode(self._stops.flush(), final=True)
