"""Stop strings, found wherever they lie across deltas, and never shown."""

from collections.abc import Sequence


def _failure_table(pattern: str) -> list[int]:
    """table[k]: length of the longest proper border of pattern[:k]. Knuth, Morris, Pratt 1977."""
    table = [0, 0]
    for index in range(1, len(pattern)):
        border = table[index]
        while border and pattern[border] != pattern[index]:
            border = table[border]
        table.append(border + (pattern[border] == pattern[index]))
    return table


class StopFinder:
    """Passes text through until the first of the stop strings is complete.

    The one that is complete first wins, and of those that end at one place the longest: so the result does not depend
    on how the text was cut into deltas. Only what may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`stops` are not empty strings. `include`: the stop string is part of the output."""
        self._stops = [(stop, _failure_table(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""
        self._include = include
        self.found: str | None = None

    def feed(self, delta: str) -> str:
        """What may be shown now. After a stop was found: nothing."""
        if self.found is not None:
            return ""
        if not self._stops:
            return delta
        text = self._held + delta
        for index in range(len(self._held), len(text)):
            if (stop := self._advance(text[index])) is not None:
                self.found, self._held = stop, ""
                return text[: index + 1] if self._include else text[: index + 1 - len(stop)]
        shown = len(text) - max(self._matched)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """At the end of the text: what was held back after all."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        complete = ""
        for i, (stop, table) in enumerate(self._stops):
            length = self._matched[i]
            while length and stop[length] != character:
                length = table[length]
            length += stop[length] == character
            self._matched[i] = length
            if length == len(stop) and length > len(complete):
                complete = stop
        return complete or None
