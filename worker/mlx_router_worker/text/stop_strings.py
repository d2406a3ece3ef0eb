"""Stop strings, matched on text: a stop word that begins inside a token would never be found among tokens."""

from __future__ import annotations

__all__ = ["StopStrings"]


class StopStrings:
    """Cuts a stream of text before the first stop string, also when it comes in pieces.

    Text that may be the beginning of a stop string is held back until the next piece decides.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.cut = 0
        """Length of what was dropped when a stop string was met, itself included."""

    @property
    def held(self) -> int:
        """Length of the text that waits for the next piece."""
        return len(self._held)

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take a piece; returns the text that is safe to show and the stop string that was met, if one was."""
        if not self._stops:
            return text, None
        text = self._held + text
        self._held = ""
        # The match that is complete first wins, of two the longer: so it cannot matter how the text was cut.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at = min(found)
            self.cut = len(text) - at
            return text[:at], text[at:end]
        keep = max(self._overlap(text, stop) for stop in self._stops)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text, None

    def flush(self) -> str:
        """The text still held back, once it is known that nothing follows."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
