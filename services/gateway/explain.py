"""Why a request goes where it goes, for whoever asks: the header of an answer, and the dry run."""

import json
from collections.abc import Sequence
from typing import Any

from tailrace.policy.routing import CostTerms, PrefixRange, Route

HEADER = "X-Tailrace-Explain"
"""`1` in a request asks for it; the answer's has it, as JSON on one line."""
MAX_CANDIDATES = 16
"""Described of each prompt, the cheapest first; a cluster has thousands of pairs, and a header has a few kilobytes."""
MAX_PROMPTS = 4
"""Described in a header."""


def is_asked(value: str | None) -> bool:
    """Whether a request's header asks for it."""
    return value is not None and value.strip().lower() in ("1", "true")


def describe(route: Route, num_prompt_tokens: int) -> dict[str, Any]:
    """The chosen pair and the candidates; all times are predictions, in seconds."""
    terms = route.terms
    cheapest = sorted(terms, key=lambda candidate: candidate.total_s)[:MAX_CANDIDATES]
    sources = {"sources": [_describe_source(source) for source in route.sources]} if route.sources else {}
    return {
        "prompt_tokens": num_prompt_tokens,
        "chosen": {"prefill_id": route.prefill_id, "decode_id": route.decode_id, **sources},
        "num_candidates": len(terms),
        "candidates": [_describe(terms) for terms in cheapest],
    }


def _describe(terms: CostTerms) -> dict[str, Any]:
    """Without the terms that do not apply to it: nothing cached, nothing fetched, nobody who would wait."""
    plain = terms._field_defaults
    known = {name: value for name, value in terms._asdict().items() if name not in plain or value != plain[name]}
    described = {**known, "total_s": terms.total_s}
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in described.items()}


def _describe_source(source: PrefixRange) -> dict[str, Any]:
    """Whom the prefill worker is told to ask for which blocks, and on which tiers they are said to lie."""
    in_memory = source.num_blocks - source.on_disk
    tiers = {"cpu" if source.is_store else "peer": in_memory, "nvme": source.on_disk}
    return {
        "holder_id": source.holder_id,
        "first_block": source.first_block,
        "blocks_by_tier": {tier: num_blocks for tier, num_blocks in tiers.items() if num_blocks},
    }


def header_value(described: Sequence[dict[str, Any]]) -> str:
    """One object a prompt, in ASCII."""
    return json.dumps(described[:MAX_PROMPTS], separators=(",", ":"))
