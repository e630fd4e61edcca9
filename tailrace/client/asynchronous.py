"""`AsyncClient`: requests from an event loop."""

from typing import Self, Unpack

from tailrace.client.completion import Collector, Completion
from tailrace.client.request import GenerateOptions, PromptLike, checked_address, make_request
from tailrace.rpc.inference import AsyncGenerateCall, AsyncInferenceChannel


class AsyncClient:
    """A connection to one gateway, for the event loop that runs when it is first used; see `Client` for the rest."""

    def __init__(self, address: str, *, api_key: str | None = None, timeout_s: float | None = None) -> None:
        self._address = checked_address(address)
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._channel: AsyncInferenceChannel | None = None
        self._is_closed = False

    def generate(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> AsyncGenerateCall:
        """Events as they come: Started, TokenChunk..., Finished.

        The request is under way when this returns. Errors of the gateway are raised by the iteration, as
        TailraceError; breaking off the iteration and dropping or closing the result cancels the request.
        """
        if self._is_closed:
            raise ValueError("the client is closed")
        request = make_request(prompt, options, self._timeout_s)
        if self._channel is None:
            # Not before: a gRPC channel belongs to the loop that runs when it is made.
            self._channel = AsyncInferenceChannel(self._address, self._api_key)
        return self._channel.generate(request)

    async def complete(self, prompt: PromptLike, **options: Unpack[GenerateOptions]) -> Completion:
        """The whole answer. Raises TailraceError."""
        collector = Collector()
        async with self.generate(prompt, **options) as events:
            async for event in events:
                collector.add(event)
        return collector.completion()

    async def aclose(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._is_closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
