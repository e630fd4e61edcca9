"""`Client`: requests from ordinary code and threads."""

from typing import Self, Unpack

from tailrace.client.completion import Collector, Completion
from tailrace.client.request import GenerateOptions, PromptLike, checked_address, make_request
from tailrace.rpc.inference import GenerateCall, InferenceChannel


class Client:
    """A connection to one gateway; threads may share it.

    `address` is host:port of the gateway's gRPC server. `timeout_s` bounds each request as a whole; None leaves it to
    the gateway.
    """

    def __init__(self, address: str, *, api_key: str | None = None, timeout_s: float | None = None) -> None:
        self._channel = InferenceChannel(checked_address(address), api_key)
        self._timeout_s = timeout_s
        self._is_closed = False

    def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> GenerateCall:
        """Events as they come: Started, TokenChunk..., Finished.

        The request is under way when this returns. Errors of the gateway are raised by the iteration, as
        TailraceError; breaking off the iteration and dropping or closing the result cancels the request.
        """
        if self._is_closed:
            raise ValueError("the client is closed")
        return self._channel.generate(make_request(prompt, options, self._timeout_s))

    def complete(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer. Raises TailraceError."""
        collector = Collector()
        with self.generate(prompt, **options) as events:
            for event in events:
                collector.add(event)
        return collector.completion()

    def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
