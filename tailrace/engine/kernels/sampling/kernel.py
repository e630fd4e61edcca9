"""One program a row, from logits to a token: its grid depends on the number of rows alone, whatever they ask for.

`adjust_kernel` runs in steps where some row has a bias, min_tokens or penalties; `sample_kernel` in every step. What a
row uses is read on the device, from the state of its slot, so that nothing waits for the host. Given the same
probabilities a row's token is bit for bit that of the spec: masks are comparisons with a floor, and sums are exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

from tailrace.engine.kernels.launch import Launch, power_of_2
from tailrace.engine.kernels.sampling.columns import Feature, FloatColumn, IntColumn, SlotTensors

_MAX_TILE = 8192
_ELEMENTS_A_WARP = 512
_MAX_WARPS = 16
_CHUNK = 1024
_DRAW = tl.constexpr(int(Feature.DRAW))
_BIAS = tl.constexpr(int(Feature.BIAS))
_MIN_TOKENS_USED = tl.constexpr(int(Feature.MIN_TOKENS))
_PENALTIES = tl.constexpr(int(Feature.PENALTIES))
_TEMPERATURE = tl.constexpr(int(FloatColumn.TEMPERATURE))
_TOP_P = tl.constexpr(int(FloatColumn.TOP_P))
_MIN_P = tl.constexpr(int(FloatColumn.MIN_P))
_REPETITION = tl.constexpr(int(FloatColumn.REPETITION))
_PRESENCE = tl.constexpr(int(FloatColumn.PRESENCE))
_FREQUENCY = tl.constexpr(int(FloatColumn.FREQUENCY))
_SEED_LOW = tl.constexpr(int(IntColumn.SEED_LOW))
_SEED_HIGH = tl.constexpr(int(IntColumn.SEED_HIGH))
_TOP_K = tl.constexpr(int(IntColumn.TOP_K))
_MIN_TOKENS = tl.constexpr(int(IntColumn.MIN_TOKENS))
_PROMPT_TOKENS = tl.constexpr(int(IntColumn.PROMPT_TOKENS))
_FLOATS = tl.constexpr(len(FloatColumn))
_INTS = tl.constexpr(len(IntColumn))


@triton.jit
def _added(adjusted, ids, values, width, CHUNK: tl.constexpr):
    """Adds each of a slot's values to its logit. The ids of values other than zero are distinct."""
    for at in range(0, width, CHUNK):
        entry = at + tl.arange(0, CHUNK)
        value = tl.load(values + entry, mask=entry < width, other=0.0)
        token = tl.load(ids + entry, mask=entry < width, other=0)
        logit = tl.load(adjusted + token, mask=value != 0.0, other=0.0)
        tl.store(adjusted + token, logit + value, mask=value != 0.0)
    tl.debug_barrier()


@triton.jit
def _penalized(adjusted, counts, pending, history, position, num_prompt, floats, CHUNK: tl.constexpr):
    """As naive.penalize, in the number of tokens before this one. Each pass ends before the next reads what it wrote.

    A token that occurs twice is written twice, with the same value: it is computed from what no pass has changed yet.
    """
    repetition = tl.load(floats + _REPETITION)
    presence = tl.load(floats + _PRESENCE)
    frequency = tl.load(floats + _FREQUENCY)
    for at in range(0, position, CHUNK):
        place = at + tl.arange(0, CHUNK)
        token = tl.load(history + place, mask=place < position, other=0)
        tl.store(counts + token, tl.zeros([CHUNK], tl.int32), mask=place < position)
    tl.debug_barrier()
    for at in range(num_prompt, position, CHUNK):
        place = at + tl.arange(0, CHUNK)
        token = tl.load(history + place, mask=place < position, other=0)
        tl.atomic_add(counts + token, 1, mask=place < position, sem="relaxed", scope="cta")
    tl.debug_barrier()
    for at in range(0, position, CHUNK):
        place = at + tl.arange(0, CHUNK)
        token = tl.load(history + place, mask=place < position, other=0)
        logit = tl.load(adjusted + token, mask=place < position, other=0.0)
        count = tl.load(counts + token, mask=place < position, other=0).to(tl.float32)
        scaled = tl.where(logit > 0, tl.div_rn(logit, repetition), logit * repetition)
        lowered = scaled - (count * frequency + tl.where(count > 0, presence, 0.0))
        tl.store(pending + token, lowered, mask=place < position)
    tl.debug_barrier()
    for at in range(0, position, CHUNK):
        place = at + tl.arange(0, CHUNK)
        token = tl.load(history + place, mask=place < position, other=0)
        tl.store(adjusted + token, tl.load(pending + token, mask=place < position), mask=place < position)


@triton.jit(do_not_specialize=["bias_width", "forbidden_width"])
def adjust_kernel(
    adjusted,  # [rows, VOCAB] float32
    counts,  # [rows, VOCAB] int32, scratch
    pending,  # [rows, VOCAB] float32, scratch
    logits,  # [rows, VOCAB] float32
    slots,  # [rows] int64
    positions,  # [rows] int64
    tokens,  # [slots, max_model_len] int32
    floats,  # [slots, _FLOATS] float32
    ints,  # [slots, _INTS] int64
    flags,  # [features, slots] bool
    bias_ids,  # [slots, bias_width] int64
    bias_values,  # [slots, bias_width] float32
    forbidden_ids,  # [slots, forbidden_width] int64
    forbidden_values,  # [slots, forbidden_width] float32
    logits_stride,
    tokens_stride,
    flags_stride,
    bias_width,
    forbidden_width,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # grid: (rows,)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    position = tl.load(positions + row).to(tl.int32)
    own = adjusted + row * VOCAB
    for at in range(0, VOCAB, TILE):
        column = at + tl.arange(0, TILE)
        logit = tl.load(logits + row * logits_stride + column, mask=column < VOCAB)
        tl.store(own + column, logit, mask=column < VOCAB)
    tl.debug_barrier()
    num_prompt = tl.load(ints + slot * _INTS + _PROMPT_TOKENS).to(tl.int32)
    if tl.load(flags + _BIAS * flags_stride + slot):
        _added(own, bias_ids + slot * bias_width, bias_values + slot * bias_width, bias_width, CHUNK)
    is_early = position - num_prompt < tl.load(ints + slot * _INTS + _MIN_TOKENS)
    if tl.load(flags + _MIN_TOKENS_USED * flags_stride + slot) & is_early:
        ids = forbidden_ids + slot * forbidden_width
        _added(own, ids, forbidden_values + slot * forbidden_width, forbidden_width, CHUNK)
    if tl.load(flags + _PENALTIES * flags_stride + slot):
        history = tokens + slot * tokens_stride
        _penalized(
            own, counts + row * VOCAB, pending + row * VOCAB, history, position, num_prompt, floats + slot * _FLOATS,
            CHUNK,
        )  # fmt: skip


@triton.jit
def _kept(probs, at, floor, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Probabilities at `at` and after: 0 where below the floor, -1 beyond the vocabulary."""
    column = at + tl.arange(0, TILE)
    prob = tl.load(probs + column, mask=column < VOCAB, other=-1.0)
    return tl.where((prob < floor) & (prob >= 0), 0.0, prob)


@triton.jit
def _mass(kept):
    """float64, rounded to multiples of 2**-52: sums below 2 are exact in any order. As naive._exact."""
    return (tl.maximum(kept, 0.0).to(tl.float64) + 1.0) - 1.0


@triton.jit
def _total(probs, floor, VOCAB: tl.constexpr, TILE: tl.constexpr):
    total = tl.zeros([TILE], tl.float64)
    for at in range(0, VOCAB, TILE):
        total += _mass(_kept(probs, at, floor, VOCAB, TILE))
    return tl.sum(total, axis=0)


@triton.jit
def _floor_of(probs, floor, wanted, VOCAB: tl.constexpr, TILE: tl.constexpr, BY_MASS: tl.constexpr):
    """The largest probability such that the tokens at least that likely hold `wanted`: by their mass or their number.

    Bits of floats from 0 to 1 are ordered as they are: 30 bits, found two at a time, from the top.
    """
    found = tl.zeros([], tl.int32)
    for step in range(0, 15):
        unit = 1 << (28 - 2 * step)
        first, second, third = tl.zeros([], tl.float64), tl.zeros([], tl.float64), tl.zeros([], tl.float64)
        for at in range(0, VOCAB, TILE):
            kept = _kept(probs, at, floor, VOCAB, TILE)
            bits = kept.to(tl.int32, bitcast=True)
            weight = _mass(kept) if BY_MASS else tl.full([TILE], 1.0, tl.float64)
            first += tl.sum(tl.where(bits >= found + unit, weight, 0.0), axis=0)
            second += tl.sum(tl.where(bits >= found + 2 * unit, weight, 0.0), axis=0)
            third += tl.sum(tl.where(bits >= found + 3 * unit, weight, 0.0), axis=0)
        digit = (first >= wanted).to(tl.int32) + (second >= wanted).to(tl.int32) + (third >= wanted).to(tl.int32)
        found += digit * unit
    return tl.maximum(floor, found.to(tl.float32, bitcast=True))


@triton.jit
def _inverted(probs, floor, uniform, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The first token whose cumulative mass exceeds the drawn share of the total, or reaches all of it."""
    total = _total(probs, floor, VOCAB, TILE)
    target = uniform * total
    before = tl.zeros([], tl.float64)
    token = VOCAB
    for at in range(0, VOCAB, TILE):
        mass = _mass(_kept(probs, at, floor, VOCAB, TILE))
        after = before + tl.sum(mass, axis=0)
        if (token == VOCAB) & ((after > target) | (after >= total)):
            cumulative = before + tl.cumsum(mass, axis=0)
            is_behind = (cumulative > target) | (cumulative >= total)
            token = tl.min(tl.where(is_behind, at + tl.arange(0, TILE), VOCAB), axis=0)
        before = after
    return tl.minimum(token, VOCAB - 1)


@triton.jit
def _softmax(probs, logits, best, temperature, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Writes the probabilities; returns the largest."""
    total = tl.zeros([TILE], tl.float32)
    for at in range(0, VOCAB, TILE):
        column = at + tl.arange(0, TILE)
        logit = tl.load(logits + column, mask=column < VOCAB, other=-float("inf"))
        share = tl.exp(tl.div_rn(logit - best, temperature))
        tl.store(probs + column, share, mask=column < VOCAB)
        total += share
    tl.debug_barrier()
    whole = tl.sum(total, axis=0)
    for at in range(0, VOCAB, TILE):
        column = at + tl.arange(0, TILE)
        share = tl.load(probs + column, mask=column < VOCAB, other=0.0)
        tl.store(probs + column, tl.div_rn(share, whole), mask=column < VOCAB)
    tl.debug_barrier()
    return tl.div_rn(1.0, whole)


@triton.jit
def _uniform(seed_low, seed_high, choice, position):
    """As philox.uniforms: the counter is (position, choice, 0, 0), the key the seed."""
    zero = (position * 0).to(tl.uint32)
    high, low, _, _ = philox_impl(
        position.to(tl.uint32), choice.to(tl.uint32), zero, zero, seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    )
    bits = ((high >> 5).to(tl.int64) << 26) | (low >> 6).to(tl.int64)
    return bits.to(tl.float64) * 1.1102230246251565e-16  # 2**-53


@triton.jit
def sample_kernel(
    token_ids,  # [rows] int64
    is_bad,  # [rows] int8
    probs,  # [rows, VOCAB] float32, scratch of the rows that draw
    logits,  # [rows, VOCAB] float32
    slots,  # [rows] int64
    choices,  # [rows] int64
    positions,  # [rows] int64
    floats,  # [slots, _FLOATS] float32
    ints,  # [slots, _INTS] int64
    flags,  # [features, slots] bool
    logits_stride,
    flags_stride,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    # grid: (rows,)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    own = logits + row * logits_stride
    best = tl.full([TILE], -float("inf"), tl.float32)
    token = tl.zeros([TILE], tl.int32)
    is_odd = tl.zeros([TILE], tl.int32)
    for at in range(0, VOCAB, TILE):
        column = at + tl.arange(0, TILE)
        logit = tl.load(own + column, mask=column < VOCAB, other=-float("inf"))
        is_odd |= (logit != logit).to(tl.int32)
        is_more = logit > best
        token = tl.where(is_more, column, token)
        best = tl.where(is_more, logit, best)
    largest = tl.max(best, axis=0)
    # The lowest of equally likely ids.
    drawn = tl.min(tl.where(best == largest, token, VOCAB - 1), axis=0)
    is_fine = (tl.max(is_odd, axis=0) == 0) & (tl.abs(largest) < float("inf"))
    if is_fine & tl.load(flags + _DRAW * flags_stride + slot):
        shares = probs + row * VOCAB
        settings, numbers = floats + slot * _FLOATS, ints + slot * _INTS
        likeliest = _softmax(shares, own, largest, tl.load(settings + _TEMPERATURE), VOCAB, TILE)
        floor = tl.load(settings + _MIN_P) * likeliest
        top_k = tl.minimum(tl.load(numbers + _TOP_K), VOCAB)
        if top_k > 0:
            floor = _floor_of(shares, floor, top_k.to(tl.float64), VOCAB, TILE, False)
        top_p = tl.load(settings + _TOP_P)
        if top_p < 1.0:
            wanted = top_p.to(tl.float64) * _total(shares, floor, VOCAB, TILE)
            # The least that counts: the likeliest token stays whatever the bound.
            wanted = tl.maximum(wanted, 2.220446049250313e-16)
            floor = _floor_of(shares, floor, wanted, VOCAB, TILE, True)
        uniform = _uniform(
            tl.load(numbers + _SEED_LOW), tl.load(numbers + _SEED_HIGH), tl.load(choices + row),
            tl.load(positions + row),
        )  # fmt: skip
        drawn = _inverted(shares, floor, uniform, VOCAB, TILE)
    tl.store(token_ids + row, tl.where(is_fine, drawn, 0).to(tl.int64))
    tl.store(is_bad + row, tl.where(is_fine, 0, 1).to(tl.int8))


def _tile(vocab: int) -> tuple[int, int]:
    """Elements a program looks at together, and its warps."""
    tile = min(_MAX_TILE, power_of_2(vocab))
    return tile, min(_MAX_WARPS, max(1, tile // _ELEMENTS_A_WARP))


def sample_launch(vocab: int) -> Launch:
    tile, num_warps = _tile(vocab)
    return Launch({"VOCAB": vocab, "TILE": tile}, num_warps, fuses_products=False)


def adjust_launch(vocab: int) -> Launch:
    tile, num_warps = _tile(vocab)
    return Launch({"VOCAB": vocab, "TILE": tile, "CHUNK": _CHUNK}, num_warps, fuses_products=False)


def adjust(
    logits: Tensor,  # [rows, vocab] float32, left as it is
    state: SlotTensors,
    slots: Tensor,  # [rows] int64
    positions: Tensor,  # [rows] int64
    tokens: Tensor,  # [slots, max_model_len] int32
) -> Tensor:  # [rows, vocab] float32
    """The logits after bias, min_tokens and penalties."""
    rows, vocab = logits.shape
    assert logits.stride(1) == tokens.stride(1) == 1
    _assert_contiguous(slots, positions, *state.all)
    adjusted, pending = (torch.empty(rows, vocab, dtype=torch.float32, device=logits.device) for _ in range(2))
    counts = torch.empty(rows, vocab, dtype=torch.int32, device=logits.device)
    if rows:
        adjust_kernel[(rows,)](
            adjusted=adjusted,
            counts=counts,
            pending=pending,
            logits=logits,
            slots=slots,
            positions=positions,
            tokens=tokens,
            floats=state.floats,
            ints=state.ints,
            flags=state.flags,
            bias_ids=state.bias_ids,
            bias_values=state.bias_values,
            forbidden_ids=state.forbidden_ids,
            forbidden_values=state.forbidden_values,
            logits_stride=logits.stride(0),
            tokens_stride=tokens.stride(0),
            flags_stride=state.flags.stride(0),
            bias_width=state.bias_ids.shape[1],
            forbidden_width=state.forbidden_ids.shape[1],
            **adjust_launch(vocab).keywords,
        )
    return adjusted


def draw(
    logits: Tensor,  # [rows, vocab] float32, left as it is
    state: SlotTensors,
    slots: Tensor,  # [rows] int64
    choices: Tensor,  # [rows] int64
    positions: Tensor,  # [rows] int64
) -> tuple[Tensor, Tensor]:
    """Token ids [rows] int64, and [rows] bool: whose logits cannot be drawn from, which makes their token 0."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    _assert_contiguous(slots, choices, positions, *state.all)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    is_bad = torch.empty(rows, dtype=torch.int8, device=logits.device)
    probs = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    if rows:
        sample_kernel[(rows,)](
            token_ids=token_ids,
            is_bad=is_bad,
            probs=probs,
            logits=logits,
            slots=slots,
            choices=choices,
            positions=positions,
            floats=state.floats,
            ints=state.ints,
            flags=state.flags,
            logits_stride=logits.stride(0),
            flags_stride=state.flags.stride(0),
            **sample_launch(vocab).keywords,
        )
    return token_ids, is_bad.view(torch.bool)


def _assert_contiguous(*tensors: Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors)
