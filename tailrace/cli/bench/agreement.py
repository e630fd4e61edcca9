"""How far two engines agree on one text: perplexity, divergence, the most likely token, and greedy continuations."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tailrace.cli.bench.teacher_forcing import Places

_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Pair:
    """`arm` judged by `reference`; both are names of arms."""

    arm: str
    reference: str

    def __str__(self) -> str:
        return f"{self.arm} over {self.reference}"


@dataclass(frozen=True, slots=True)
class TextAgreement:
    perplexity_ratio: float
    """Of the arm over the reference."""
    perplexity_ratio_low: float
    perplexity_ratio_high: float
    """The ends of its 95 % confidence interval, with the differences at single places as independent of one another."""
    kl_nats: float
    """Of the arm's distribution from the reference's, the mean over all places."""
    same_best: float
    """Share of the places at which both hold the same token for the most likely one."""


@dataclass(frozen=True, slots=True)
class GreedyAgreement:
    tokens_before_difference: float
    """Share of the tokens that come before a text's first difference."""
    equal_texts: float
    """Share of the texts without any."""


@dataclass(slots=True)
class TextScores:
    """What several arms make of one text; every arm sees the same places in the same order."""

    pairs: Sequence[Pair]
    _nats: dict[str, list[Tensor]] = field(default_factory=dict)
    _best: dict[str, list[Tensor]] = field(default_factory=dict)
    _kl: dict[Pair, list[Tensor]] = field(default_factory=dict)

    def add(self, places: Mapping[str, Places]) -> None:
        """The same places, by arm. Raises ValueError if they are not."""
        first, *others = [own.tokens for own in places.values()]
        if not all(torch.equal(first, other) for other in others):
            raise ValueError("the arms are at different places of the text")
        logprobs = {name: own.logits.log_softmax(-1) for name, own in places.items()}
        for name, values in logprobs.items():
            nats = -values.gather(1, first[:, None]).squeeze(1)
            self._nats.setdefault(name, []).append(nats.double())
            self._best.setdefault(name, []).append(values.argmax(-1))
        for pair in self.pairs:
            divergence = _divergence(logprobs[pair.reference], logprobs[pair.arm])
            self._kl.setdefault(pair, []).append(divergence.double())

    def add_all(self, places: Mapping[str, Iterable[Places]]) -> None:
        """As `add`, for streams that are read in step. Raises ValueError."""
        for together in zip(*places.values(), strict=True):
            self.add(dict(zip(places, together, strict=True)))

    def perplexity(self, arm: str) -> float:
        return math.exp(torch.cat(self._nats[arm]).mean().item())

    def agreement(self, pair: Pair) -> TextAgreement:
        worse = torch.cat(self._nats[pair.arm]) - torch.cat(self._nats[pair.reference])
        mean, error = worse.mean().item(), _NORMAL_95 * worse.std().item() / math.sqrt(len(worse))
        same = torch.cat(self._best[pair.arm]) == torch.cat(self._best[pair.reference])
        return TextAgreement(
            perplexity_ratio=math.exp(mean),
            perplexity_ratio_low=math.exp(mean - error),
            perplexity_ratio_high=math.exp(mean + error),
            kl_nats=torch.cat(self._kl[pair]).mean().item(),
            same_best=same.double().mean().item(),
        )


def _divergence(reference: Tensor, arm: Tensor) -> Tensor:
    """[places]; both are log-probabilities [places, vocab]. A token that the reference rules out adds nothing."""
    shares = reference.exp()
    return (shares * (reference - arm)).masked_fill_(shares == 0, 0.0).sum(-1)


def greedy_agreement(texts: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> GreedyAgreement:
    """Texts of one length, by prompt."""
    alike = [_common(one, other) for one, other in zip(texts, references, strict=True)]
    return GreedyAgreement(
        tokens_before_difference=sum(alike) / sum(map(len, references)),
        equal_texts=sum(count == len(text) for count, text in zip(alike, references, strict=True)) / len(alike),
    )


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
