"""From a submission to what a scheduler takes."""

from tailrace.errors import InvalidRequestError
from tailrace.kv.hashing import chain_seed, hash_blocks, tenant_name
from tailrace.kv.layout import KVLayout
from tailrace.messages import Submission
from tailrace.policy.request import Request


class RequestMaker:
    """Knows the layout's fingerprint, which takes a while to compute."""

    def __init__(self, layout: KVLayout, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._fingerprint = layout.fingerprint
        self._block_size = layout.block_size

    def make(self, leg_id: int, submission: Submission) -> Request:
        """Raises InvalidRequestError for a token that the model does not have."""
        if max(submission.tokens) >= self._vocab_size:
            raise InvalidRequestError(
                f"token {max(submission.tokens)}; the model has 0 to {self._vocab_size - 1}", param="token_ids"
            )
        seed = chain_seed(self._fingerprint, "", submission.cache_salt)
        return Request(
            id=leg_id,
            tokens=submission.tokens,
            num_prompt_tokens=submission.num_prompt_tokens,
            sampling=submission.sampling,
            choices=submission.choices,
            priority=submission.priority,
            hash_seed=seed,
            hashes=hash_blocks(submission.tokens, self._block_size, seed),
            tenant=tenant_name(submission.cache_salt),
        )
