"""From logits to tokens, for all rows of a step at once.

Order, as in vLLM: logit_bias, min_tokens, repetition, presence and frequency penalties, temperature, min-p, top-k,
top-p, draw. A feature that no slot uses costs nothing; one that some rows use is computed for those rows only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailrace.engine.host_copies import HostCopy, upload
from tailrace.engine.kernels import backend
from tailrace.engine.kernels.sampling import naive
from tailrace.engine.kernels.sampling.columns import Feature, FloatColumn, IntColumn, SlotTensors
from tailrace.engine.kernels.sampling.logprobs import token_logprobs
from tailrace.engine.kernels.sampling.philox import uniforms
from tailrace.types import SamplingParams, TokenLogprob

_LOW_32 = 0xFFFFFFFF
_COLDEST, _HOTTEST = 1e-30, 1e30
"""Beyond these a temperature changes nothing, but a denormal or infinite one would make NaN of 0 / 0 or inf / inf."""

_CACHED_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class SampleResult:
    """`token_ids` has an entry per row; so has `logprobs`, or is None when no row asked.

    `bad_rows` are the rows whose logits cannot be drawn from: a NaN, +inf, or no token left unmasked. Their token is 0
    and means nothing; the other rows are not affected.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    bad_rows: tuple[int, ...] = ()


class _AddedLogits:
    """For each slot a list of (token id, value to add to its logit), as rows padded with (0, 0.0)."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.ids = torch.zeros(max_num_seqs, 0, dtype=torch.int64, device=device)
        self.values = torch.zeros(max_num_seqs, 0, dtype=torch.float32, device=device)

    def set(self, slot: int, entries: Sequence[tuple[int, float]]) -> None:
        missing = len(entries) - self.ids.shape[1]
        if missing > 0:
            self.ids = torch.nn.functional.pad(self.ids, (0, missing))
            self.values = torch.nn.functional.pad(self.values, (0, missing))
        self.ids[slot] = 0
        self.values[slot] = 0.0
        if entries:
            ids, values = zip(*entries, strict=True)
            self.ids[slot, : len(entries)] = upload(ids, torch.int64, self.ids.device)
            self.values[slot, : len(entries)] = upload(values, torch.float32, self.ids.device)


class SamplingState:
    """The sampling parameters of every slot, as tensors; written once when a sequence begins.

    Which features are in use is kept up to date by `set` and `clear`, never looked for in a step.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.floats = torch.zeros(max_num_seqs, len(FloatColumn), dtype=torch.float32, device=self.device)
        self.ints = torch.zeros(max_num_seqs, len(IntColumn), dtype=torch.int64, device=self.device)
        self.flags = torch.zeros(len(Feature), max_num_seqs, dtype=torch.bool, device=self.device)
        self.bias = _AddedLogits(max_num_seqs, self.device)
        self.forbidden = _AddedLogits(max_num_seqs, self.device)
        self._num_logprobs = [0] * max_num_seqs
        self._users: dict[Feature, set[int]] = {feature: set() for feature in Feature}

    def set(self, slot: int, params: SamplingParams, num_prompt_tokens: int) -> None:
        """A sequence with `params` takes `slot`; what the slot held before is forgotten.

        Token ids beyond the vocabulary in logit_bias and stop_token_ids cannot be drawn anyway and have no effect.
        """
        self.floats[slot] = upload(_float_columns(params), torch.float32, self.device)
        self.ints[slot] = upload(_int_columns(params, num_prompt_tokens), torch.int64, self.device)
        bias = _distinct(params.logit_bias, self.vocab_size)
        forbidden = self._ending_tokens(params) if params.min_tokens > 0 else []
        self.bias.set(slot, bias)
        self.forbidden.set(slot, [(token, -torch.inf) for token in forbidden])
        self._num_logprobs[slot] = params.logprobs or 0
        self._use(slot, _features(params, has_bias=bool(bias), has_forbidden=bool(forbidden)))

    def clear(self, slot: int) -> None:
        """The slot is empty. A cleared slot that is sampled from all the same is greedy."""
        self._use(slot, frozenset())

    @property
    def tensors(self) -> SlotTensors:
        added = (self.bias.ids, self.bias.values, self.forbidden.ids, self.forbidden.values)
        return SlotTensors(self.floats, self.ints, self.flags, *added)

    @property
    def adjusts(self) -> bool:
        """Whether any slot's logits are changed before anything is drawn from them."""
        return any(map(self.uses, (Feature.BIAS, Feature.MIN_TOKENS, Feature.PENALTIES)))

    def uses(self, feature: Feature) -> bool:
        return bool(self._users[feature])

    def rows_using(self, feature: Feature, slots: Tensor) -> Tensor | None:
        """Indices into `slots` of the rows that use `feature`; None when there are none."""
        if not self._users[feature]:
            return None
        rows = self.flags[feature, slots].nonzero().flatten()
        return rows if rows.numel() else None

    def logprob_counts(self, host_slots: Sequence[int]) -> dict[int, int]:
        """By row: of how many of the most likely tokens it wants the log-probability, beside that of its own."""
        users = self._users[Feature.LOGPROBS]
        if not users:
            return {}
        return {row: self._num_logprobs[slot] for row, slot in enumerate(host_slots) if slot in users}

    def _use(self, slot: int, features: frozenset[Feature]) -> None:
        for feature, users in self._users.items():
            (users.add if feature in features else users.discard)(slot)
        self.flags[:, slot] = upload([feature in features for feature in Feature], torch.bool, self.device)

    def _ending_tokens(self, params: SamplingParams) -> list[int]:
        eos = () if params.ignore_eos else self.eos_token_ids
        return sorted(token for token in {*eos, *params.stop_token_ids} if 0 <= token < self.vocab_size)


def _distinct(bias: Sequence[tuple[int, float]], vocab_size: int) -> list[tuple[int, float]]:
    """An entry a token, as kernels write them all at once; a token given twice gets the sum."""
    values: dict[int, float] = {}
    for token, value in bias:
        if 0 <= token < vocab_size:
            values[token] = values.get(token, 0.0) + value
    return list(values.items())


def _float_columns(params: SamplingParams) -> list[float]:
    columns = {
        FloatColumn.TEMPERATURE: min(max(params.temperature, _COLDEST), _HOTTEST),
        FloatColumn.TOP_P: params.top_p,
        FloatColumn.MIN_P: params.min_p,
        FloatColumn.REPETITION: params.repetition_penalty,
        FloatColumn.PRESENCE: params.presence_penalty,
        FloatColumn.FREQUENCY: params.frequency_penalty,
    }
    return [columns[column] for column in FloatColumn]


def _int_columns(params: SamplingParams, num_prompt_tokens: int) -> list[int]:
    columns = {
        IntColumn.SEED_LOW: params.seed & _LOW_32,
        IntColumn.SEED_HIGH: (params.seed >> 32) & _LOW_32,
        IntColumn.TOP_K: params.top_k,
        IntColumn.MIN_TOKENS: params.min_tokens,
        IntColumn.PROMPT_TOKENS: num_prompt_tokens,
    }
    return [columns[column] for column in IntColumn]


def _features(params: SamplingParams, *, has_bias: bool, has_forbidden: bool) -> frozenset[Feature]:
    # top_k 1 is greedy: the one way in which "ties stay" would surprise.
    draws = params.temperature > 0 and params.top_k != 1
    used = {
        Feature.DRAW: draws,
        Feature.BIAS: has_bias,
        Feature.MIN_TOKENS: has_forbidden,
        Feature.PENALTIES: params.repetition_penalty != 1 or bool(params.presence_penalty or params.frequency_penalty),
        Feature.MIN_P: draws and params.min_p > 0,
        Feature.TOP_K: draws and params.top_k > 0,
        Feature.TOP_P: draws and params.top_p < 1,
        Feature.LOGPROBS: params.logprobs is not None,
    }
    return frozenset(feature for feature, is_used in used.items() if is_used)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew. What the host wants of it comes in one copy: the words of each column, one behind another."""

    token_ids: Tensor
    """[R] int64, on the device."""
    copy: HostCopy
    """token ids [R], whether they are bad [R], then of the rows with log-probabilities [L] as token_logprobs gives
    them: their token's [L] float32, ids of the most likely [L, most], and theirs [L, most] float32."""
    logprob_counts: dict[int, int]
    """How many of the most likely tokens each of these rows asked for."""

    def wait(self) -> SampleResult:
        """Blocks until everything launched so far is over."""
        words = self.copy.wait()
        num_rows = len(self.token_ids)
        token_ids, is_bad, rest = words[:num_rows], words[num_rows : 2 * num_rows], words[2 * num_rows :]
        bad_rows = tuple(row for row, bad in enumerate(is_bad.tolist()) if bad)
        return SampleResult(token_ids.tolist(), self._logprobs(num_rows, rest, bad_rows), bad_rows)

    def _logprobs(self, num_rows: int, words: Tensor, bad_rows: tuple[int, ...]) -> list[TokenLogprob | None] | None:
        count = len(self.logprob_counts)
        if not count:
            return None
        chosen, rest = words[:count].view(torch.float32), words[count:].view(2, count, (len(words) // count - 1) // 2)
        columns = chosen.tolist(), rest[0].tolist(), rest[1].view(torch.float32).tolist()
        result: list[TokenLogprob | None] = [None] * num_rows
        for (row, wanted), logprob, ids, likely in zip(self.logprob_counts.items(), *columns, strict=True):
            if row not in bad_rows:
                result[row] = TokenLogprob(logprob, tuple(zip(ids[:wanted], likely[:wanted], strict=True)))
        return result


def sample(
    logits: Tensor,  # [R, vocab] float32, left as it is
    state: SamplingState,
    slots: Tensor,  # [R] int64
    choices: Tensor,  # [R] int64
    positions: Tensor,  # [R] int64: of the token being drawn, which is the number of tokens before it
    tokens: Tensor,  # [max_num_seqs, max_model_len] int32: prompt and output so far of each slot
    host_slots: Sequence[int],  # [R]: as `slots`
) -> Drawn:
    """Draw one token per row. Several rows may share a slot (the choices of one prompt). Waits for no CUDA device.

    A row's token depends on its logits, parameters, choice and position alone, never on the other rows. Greedy takes
    the lowest of equally likely ids.
    """
    token_ids, is_bad = draw_tokens(logits, state, slots, choices, positions, tokens)
    counts = state.logprob_counts(host_slots)
    columns = [token_ids, is_bad, *_logprob_columns(logits, token_ids, counts)]
    return Drawn(token_ids, HostCopy(torch.cat([_as_words(column) for column in columns])), counts)


def _logprob_columns(logits: Tensor, token_ids: Tensor, counts: dict[int, int]) -> list[Tensor]:
    if not counts:
        return []
    most = max(counts.values())
    parts = [
        token_logprobs(logits[part], token_ids[part], most)
        for part in _parts(upload(list(counts), torch.int64, logits.device), logits)
    ]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _as_words(column: Tensor) -> Tensor:
    flat = column.flatten()
    return flat.view(torch.int32) if flat.dtype == torch.float32 else flat.int()


def draw_tokens(
    logits: Tensor, state: SamplingState, slots: Tensor, choices: Tensor, positions: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """As `sample`, without log-probabilities: token ids [R] int64, and [R] bool: which rows are bad. Theirs is 0."""
    if backend.runs_triton(logits):
        from tailrace.engine.kernels.sampling import kernel

        given = kernel.adjust(logits, state.tensors, slots, positions, tokens) if state.adjusts else logits
        return kernel.draw(given, state.tensors, slots, choices, positions)
    adjusted = _adjust(logits, state, slots, positions, tokens)
    largest, token_ids = naive.largest(adjusted)
    rows = state.rows_using(Feature.DRAW, slots)
    if rows is not None:
        token_ids[rows] = _draw(adjusted, rows, state, slots, choices, positions)
    is_bad = ~largest.isfinite()
    return token_ids.masked_fill_(is_bad, 0), is_bad


def _parts(rows: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """`rows` in parts to work on. On a CPU a few rows each: what lies between the steps then stays in its cache, and
    the allocator keeps the memory instead of faulting it in anew.
    """
    size = max(1, _CACHED_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return torch.split(rows, size)


def _adjust(logits: Tensor, state: SamplingState, slots: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """The logits after bias, min_tokens and penalties: `logits` itself where nothing of that is in use."""
    if not state.adjusts:
        return logits
    adjusted = logits.clone()
    if state.uses(Feature.BIAS):
        values = torch.where(state.flags[Feature.BIAS, slots][:, None], state.bias.values[slots], 0.0)
        adjusted.scatter_add_(1, state.bias.ids[slots], values)
    if state.uses(Feature.MIN_TOKENS):
        ints = state.ints[slots]
        is_early = positions - ints[:, IntColumn.PROMPT_TOKENS] < ints[:, IntColumn.MIN_TOKENS]
        is_early &= state.flags[Feature.MIN_TOKENS, slots]
        values = torch.where(is_early[:, None], state.forbidden.values[slots], 0.0)
        adjusted.scatter_add_(1, state.forbidden.ids[slots], values)
    rows = state.rows_using(Feature.PENALTIES, slots)
    for part in () if rows is None else _parts(rows, logits):
        adjusted[part] = _penalized(adjusted[part], state, slots[part], positions[part], tokens)
    return adjusted


def _penalized(logits: Tensor, state: SamplingState, slots: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """`logits` [R, vocab], penalised in place, for rows that all use penalties."""
    floats = state.floats[slots]
    naive.penalize(
        logits,
        tokens[:, : int(positions.max())].index_select(0, slots).long(),
        positions,
        state.ints[slots, IntColumn.PROMPT_TOKENS],
        repetition=floats[:, FloatColumn.REPETITION],
        presence=floats[:, FloatColumn.PRESENCE],
        frequency=floats[:, FloatColumn.FREQUENCY],
    )
    return logits


def _draw(
    logits: Tensor, rows: Tensor, state: SamplingState, slots: Tensor, choices: Tensor, positions: Tensor
) -> Tensor:
    """Token ids for those `rows` that have a temperature, in their order; the other arguments are of all rows."""
    seeds = state.ints[slots][:, [IntColumn.SEED_LOW, IntColumn.SEED_HIGH]]
    uniform = uniforms(seeds, choices, positions)
    return torch.cat([_draw_part(logits[part], state, slots[part], uniform[part]) for part in _parts(rows, logits)])


def _draw_part(logits: Tensor, state: SamplingState, slots: Tensor, uniform: Tensor) -> Tensor:
    floats = state.floats[slots]
    probs = naive.probabilities(logits, floats[:, FloatColumn.TEMPERATURE])
    _mask(naive.mask_min_p, probs, floats[:, FloatColumn.MIN_P], state.rows_using(Feature.MIN_P, slots))
    _mask(naive.mask_top_k, probs, state.ints[slots, IntColumn.TOP_K], state.rows_using(Feature.TOP_K, slots))
    _mask(naive.mask_top_p, probs, floats[:, FloatColumn.TOP_P], state.rows_using(Feature.TOP_P, slots))
    return naive.draw(probs, uniform).clamp_(max=logits.shape[-1] - 1)


def _mask(mask: Callable[[Tensor, Tensor], None], probs: Tensor, bound: Tensor, rows: Tensor | None) -> None:
    """Apply `mask` in place to the given rows: to all of `probs` where they are all, without a copy."""
    if rows is None:
        return
    if rows.numel() == probs.shape[0]:
        return mask(probs, bound)
    part = probs[rows]
    mask(part, bound[rows])
    probs[rows] = part
