from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.choice import ChoiceText, Delta
from services.gateway.detokenizer import decode
from services.gateway.prepare import Job, Prompt
from tailrace.types import FinishReason, SamplingParams, TokenLogprob
from tests.helpers.gateway_app import TOKENIZER, ids

VOCABULARY = TOKENIZER.vocabulary


def new_choice(stops: list[str], *, include: bool = False) -> ChoiceText:
    job = Job(
        model="m", prompts=(), sampling=SamplingParams(), num_choices=1, stops=tuple(stops), include_stop=include,
        skip_special=True, end_ids=frozenset({2}), continues_prompt=False,
    )  # fmt: skip
    return ChoiceText(VOCABULARY, job, Prompt([], 10))


def run(choice: ChoiceText, parts: list[list[int]]) -> list[Delta]:
    deltas = []
    for part in parts:
        deltas.append(choice.feed(part, [TokenLogprob(-1.0)] * len(part)))
        if choice.reason is not None:
            return deltas
    return [*deltas, choice.finish(FinishReason.LENGTH)]


texts = st.text("ab \u00e9\U0001f388", max_size=20)


@given(texts, st.lists(st.text("ab ", min_size=1, max_size=3), max_size=2), st.sets(st.integers(0, 40)), st.booleans())
def test_an_answer_does_not_depend_on_how_its_tokens_arrive(
    text: str, stops: list[str], cuts: set[int], include: bool
) -> None:
    tokens = ids(text)
    edges = [0, *sorted(cut for cut in cuts if cut < len(tokens)), len(tokens)]
    at_once, in_parts = new_choice(stops, include=include), new_choice(stops, include=include)
    whole = run(at_once, [tokens])
    parts = run(in_parts, [tokens[a:b] for a, b in pairwise(edges)])
    assert "".join(delta.text for delta in parts) == "".join(delta.text for delta in whole)
    assert [t for delta in parts for t in delta.tokens] == [t for delta in whole for t in delta.tokens]
    assert (in_parts.reason, in_parts.num_tokens) == (at_once.reason, at_once.num_tokens)


@given(texts, st.lists(st.text("ab ", min_size=1, max_size=3), max_size=2))
def test_the_stop_string_is_complete_with_the_last_counted_token(text: str, stops: list[str]) -> None:
    tokens = ids(text)
    choice = new_choice(stops)
    shown = "".join(delta.text for delta in run(choice, [[token] for token in tokens]))
    if choice.reason is FinishReason.LENGTH:
        assert (shown, choice.num_tokens) == (text, len(tokens))
        assert not any(stop in text for stop in stops)
        return
    read = [decode(VOCABULARY, tokens[:count]) for count in (choice.num_tokens - 1, choice.num_tokens)]
    assert [any(stop in part for stop in stops) for part in read] == [False, True]
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)


@given(texts)
def test_scores_tell_where_each_token_begins(text: str) -> None:
    deltas = run(new_choice([]), [[token] for token in ids(text)])
    scored = [token for delta in deltas for token in delta.tokens]
    assert [token.token_id for token in scored] == ids(text)
    for i, token in enumerate(scored):
        assert token.offset == len(decode(VOCABULARY, ids(text)[:i]).rstrip("\ufffd"))


def test_an_end_token_counts_and_is_neither_text_nor_scored() -> None:
    choice = new_choice([])
    deltas = run(choice, [[*ids("a"), 2]])
    assert "".join(delta.text for delta in deltas) == "a"
    assert [token.token_id for delta in deltas for token in delta.tokens] == ids("a")
    assert choice.num_tokens == 2
