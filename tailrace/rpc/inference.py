"""Calls of a client to a gateway: one `Generate` each, blocking or on an event loop."""

import asyncio
import contextlib
from typing import Any, Self

import grpc
import grpc.aio

from tailrace.errors import (
    CancelledByClientError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    TailraceError,
    UnauthenticatedError,
    UnavailableError,
)
from tailrace.inference import Event, Finished, GenerateRequest
from tailrace.rpc.convert_inference import error_from_trailers, event_from_proto, request_to_proto
from tailrace.rpc.gen import generation_pb2, generation_pb2_grpc
from tailrace.rpc.options import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES

_STATUS: dict[grpc.StatusCode, type[TailraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CancelledByClientError,
}


def error_of(failure: Any, address: str) -> TailraceError:
    """`failure`: a grpc.RpcError of either kind. The gateway's own words, or the transport's where it has said none."""
    if (told := error_from_trailers(failure.trailing_metadata() or ())) is not None:
        return told
    kind = _STATUS.get(failure.code(), InternalError)
    return kind(f"{address}: {failure.details() or failure.code().name.lower()}")


class _Reading:
    """Takes messages in, gives events out, and knows whether the answer is whole."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._is_finished = False

    def take(self, message: generation_pb2.GenerateResponse) -> Event | None:
        """Raises the TailraceError that the gateway has sent."""
        event = event_from_proto(message)
        if isinstance(event, TailraceError):
            raise event
        self._is_finished = self._is_finished or isinstance(event, Finished)
        return event

    def end(self) -> None:
        """Raises UnavailableError when the stream has ended too early."""
        if not self._is_finished:
            raise UnavailableError(f"{self.address}: the answer broke off")


class GenerateCall:
    """A running request, iterated once. Closing it, or dropping the last reference, cancels it at the gateway."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._reading = _Reading(address)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        """Raises TailraceError when the gateway refuses or fails, or is lost."""
        try:
            for message in self._call:
                if (event := self._reading.take(message)) is not None:
                    return event
        except grpc.RpcError as failure:
            raise error_of(failure, self._reading.address) from None
        self._reading.end()
        raise StopIteration

    def close(self) -> None:
        """Idempotent; from any thread. A thread that is waiting for an event gets CancelledByClientError."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncGenerateCall:
    """A running request, iterated once. Closing it, or dropping the last reference, cancels it at the gateway."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._reading = _Reading(address)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Raises TailraceError when the gateway refuses or fails, or is lost."""
        while (message := await self._read()) is not None:
            if (event := self._reading.take(message)) is not None:
                return event
        self._reading.end()
        raise StopAsyncIteration

    async def _read(self) -> generation_pb2.GenerateResponse | None:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, self._reading.address) from None
        except asyncio.CancelledError:
            # gRPC raises it as well when the call was closed while somebody waited for it.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise CancelledByClientError(f"{self._reading.address}: the call was closed") from None
        return None if message is grpc.aio.EOF else message

    async def aclose(self) -> None:
        """Idempotent. A task that is waiting for an event gets CancelledByClientError."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the channel with it
            self._call.cancel()


class _Caller:
    """What the two kinds of channels share: how a request becomes a call."""

    def __init__(self, address: str, api_key: str | None) -> None:
        self._address = address
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    def _call(self, method: Any, request: GenerateRequest) -> Any:
        message = request_to_proto(request)
        if (size := message.ByteSize()) > MAX_MESSAGE_BYTES:
            raise InvalidRequestError(f"prompt: {size} bytes; at most {MAX_MESSAGE_BYTES} can be sent", param="prompt")
        return method(message, metadata=self._metadata, timeout=request.deadline_s or None)


class InferenceChannel(_Caller):
    """A connection to one gateway, for threads. Opened by the first call, shared by all."""

    def __init__(self, address: str, api_key: str | None = None) -> None:
        super().__init__(address, api_key)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = generation_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(self, request: GenerateRequest) -> GenerateCall:
        """Returns at once; raises InvalidRequestError for what cannot even be sent."""
        return GenerateCall(self._call(self._stub.Generate, request), self._address)

    def close(self) -> None:
        self._channel.close()


class AsyncInferenceChannel(_Caller):
    """A connection to one gateway, for the running event loop. Opened by the first call, shared by all."""

    def __init__(self, address: str, api_key: str | None = None) -> None:
        super().__init__(address, api_key)
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = generation_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(self, request: GenerateRequest) -> AsyncGenerateCall:
        """Returns at once; raises InvalidRequestError for what cannot even be sent."""
        return AsyncGenerateCall(self._call(self._stub.Generate, request), self._address)

    async def close(self) -> None:
        await self._channel.close(None)
