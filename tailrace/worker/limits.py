"""Where every worker says no, and in which words."""

from tailrace.errors import InternalError, OverloadedError

MAX_WAITING = 4096
"""Requests in line; one more is refused."""


def line_is_full() -> OverloadedError:
    return OverloadedError(f"{MAX_WAITING} requests wait already", retry_after_s=1.0)


def no_logits() -> InternalError:
    return InternalError(
        "the model gave nothing to draw a token from: its logits are not numbers, or all tokens are masked"
    )
