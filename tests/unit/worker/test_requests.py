import pytest

from tailrace.errors import InvalidRequestError
from tailrace.kv.hashing import chain_seed, hash_blocks, tenant_name
from tailrace.worker.requests import RequestMaker
from tests.helpers.values import VOCAB_SIZE, make_layout, make_submission


def test_a_request_carries_its_submission_and_the_hashes_of_its_full_blocks() -> None:
    layout = make_layout()
    submission = make_submission(9, tokens=list(range(10)), num_prompt_tokens=7, choices=(2, 3), priority=-1)
    request = RequestMaker(layout, VOCAB_SIZE).make(5, submission)
    assert (request.id, request.tokens, request.num_prompt_tokens) == (5, list(range(10)), 7)
    assert (request.choices, request.rank, request.sampling) == ((2, 3), (-1, 5), submission.sampling)
    assert request.hashes == hash_blocks(list(range(10)), 4, chain_seed(layout.fingerprint))
    assert len(request.hashes) == 2


def test_salts_and_layouts_never_share_a_block() -> None:
    plain = RequestMaker(make_layout(), VOCAB_SIZE).make(1, make_submission())
    salted = RequestMaker(make_layout(), VOCAB_SIZE).make(1, make_submission(cache_salt="tenant"))
    other = RequestMaker(make_layout(weights_digest="w2"), VOCAB_SIZE).make(1, make_submission())
    assert len({request.hashes[0] for request in (plain, salted, other)}) == 3


def test_a_request_bears_its_tenant_s_name_and_not_the_salt() -> None:
    plain = RequestMaker(make_layout(), VOCAB_SIZE).make(1, make_submission())
    salted = RequestMaker(make_layout(), VOCAB_SIZE).make(1, make_submission(cache_salt="tenant"))
    assert (plain.tenant, salted.tenant) == ("", tenant_name("tenant"))
    assert "'tenant'" not in repr(salted)


def test_a_token_that_the_model_does_not_have_is_refused_with_the_limit() -> None:
    submission = make_submission(tokens=[3, 100], num_prompt_tokens=2)
    with pytest.raises(InvalidRequestError, match="token 100; the model has 0 to 99") as refused:
        RequestMaker(make_layout(), 100).make(1, submission)
    assert refused.value.param == "token_ids"
