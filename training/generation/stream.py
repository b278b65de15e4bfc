"""The text of one row while its tokens are generated."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not a whole character, or not yet."""
LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character, and so the most tokens that one character takes."""


class StreamedText:
    """Decodes one row token by token, and ends its text at the first stop string.

    It releases whole characters only, and holds back text that may be the start of a stop string.

    Args:
        decode: turns token ids into text.
        prompt: the token ids before the generated ones.
        stops: strings that end the text and are not part of it.

    Attributes:
        text: the text released so far.
        stopped: whether a stop string was found. Text after it is ignored.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.text, self.stopped = "", False
        self._decode, self._stops = decode, stops
        # Some tokenizers drop the space at the beginning of what they decode, so new ids are decoded together with the
        # ids before them: `_ids[_start:]`. Of these, the text of `_ids[_start:_decoded]` is known already.
        self._ids = list(prompt)
        self._start, self._decoded = 0, len(self._ids)
        self._pending = ""  # Decoded text that is not released yet.

    def add(self, token: int) -> str:
        """Add a token. Return the text that can be released now; it continues what earlier calls returned."""
        self._ids.append(token)
        return self._release(self._decode_new(final=False), final=False)

    def end(self) -> str:
        """End the row. Return the text that was held back."""
        return self._release(self._decode_new(final=True), final=True)

    def _decode_new(self, final: bool) -> str:
        known = self._decode(self._ids[self._start : self._decoded])
        new = self._decode(self._ids[self._start :])[len(known) :]
        if not final and new.endswith(REPLACEMENT) and len(self._ids) - self._decoded < LONGEST_CHARACTER:
            return ""  # The last character is not complete.
        if new:
            self._start = self._decoded
        self._decoded = len(self._ids)
        return new

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._pending += new
        stop_places = [place for stop in self._stops if (place := self._pending.find(stop)) >= 0]
        if stop_places:
            self.stopped = True
            released, self._pending = self._pending[: min(stop_places)], ""
        else:
            keep = 0 if final else max((_overlap(self._pending, stop) for stop in self._stops), default=0)
            released = self._pending[: len(self._pending) - keep]
            self._pending = self._pending[len(released) :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
