"""One choice: tokens in, text out, with stop strings and log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.detokenizer import Detokenizer
from services.gateway.prepare import Job, Prompt
from services.gateway.stop import StopFinder
from services.gateway.vocabulary import Vocabulary
from tailrace.types import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class ScoredToken:
    token_id: int
    scores: TokenLogprob
    offset: int
    """Where its text begins in the choice's text, in characters."""


@dataclass(slots=True)
class Delta:
    """What became printable. `tokens` only when log-probabilities were asked for: those whose text is shown."""

    text: str = ""
    tokens: Sequence[ScoredToken] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class ChoiceText:
    """Text of one choice. `num_tokens` counts up to and including the one that ended it."""

    __slots__ = (
        "_detokenizer",
        "_end_ids",
        "_ends_are_special",
        "_has_stops",
        "_length",
        "_shown",
        "_stops",
        "_waiting",
        "num_tokens",
        "reason",
    )

    def __init__(self, vocabulary: Vocabulary, job: Job, prompt: Prompt) -> None:
        after = prompt.tokens if job.continues_prompt else ()
        self._detokenizer = Detokenizer(vocabulary, skip_special=job.skip_special, after=after)
        self._stops = StopFinder(job.stops, include=job.include_stop)
        self._has_stops = bool(job.stops)
        self._end_ids = job.end_ids
        self._ends_are_special = job.end_ids <= vocabulary.special_ids
        self._waiting: list[ScoredToken] = []
        self._length = 0
        self._shown = 0
        self.num_tokens = 0
        self.reason: FinishReason | None = None

    def feed(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] | None) -> Delta:
        """Sets `reason` when a stop string is complete; what follows is ignored."""
        if logprobs is None and not self._has_stops:
            return self._feed_plain(token_ids)
        shown = []
        for i, token_id in enumerate(token_ids):
            if self.reason is not None:
                break
            self.num_tokens += 1
            if token_id in self._end_ids:
                continue  # the event that ends the choice follows
            if logprobs is not None:
                self._waiting.append(ScoredToken(token_id, logprobs[i], self._length))
            shown.append(self._show(self._detokenizer.feed(token_id)))
        return self._delta("".join(shown))

    def _feed_plain(self, token_ids: Sequence[int]) -> Delta:
        """Nothing is held back and no place in the text is asked for: what is printable is shown."""
        self.num_tokens += len(token_ids)
        feed, end_ids = self._detokenizer.feed, self._end_ids
        text = ""
        for token_id in token_ids:
            if token_id not in end_ids:
                text += feed(token_id)
        return Delta(text)

    @property
    def is_plain(self) -> bool:
        """A token that is not special and whole text would be shown as it is, and is only to be counted."""
        return not self._has_stops and self._ends_are_special and self._detokenizer.is_plain

    def finish(self, reason: FinishReason) -> Delta:
        """The choice ended by itself: what was held back is shown, unless that completes a stop string."""
        text = self._show(self._detokenizer.flush())
        if self.reason is None:
            self.reason = reason
            text += self._stops.flush()
        return self._delta(text)

    def _show(self, text: str) -> str:
        self._length += len(text)
        shown = self._stops.feed(text)
        if self._stops.found is not None:
            self.reason = FinishReason.STOP
        return shown

    def _delta(self, text: str) -> Delta:
        self._shown += len(text)
        waiting, self._waiting = self._waiting, []
        if self._shown < self._length:
            tokens = [token for token in waiting if token.offset < self._shown]
            self._waiting = [] if self.reason else waiting[len(tokens) :]
            return Delta(text, tokens)
        return Delta(text, waiting)
