"""The Python SDK: `Client` for threads, `AsyncClient` for event loops. Needs grpcio and protobuf, nothing else."""

from tailrace.client.asynchronous import AsyncClient
from tailrace.client.blocking import Client
from tailrace.client.completion import CompletedChoice, Completion
from tailrace.inference import ChatMessage, Event, Finished, Started, TokenChunk, Usage
from tailrace.types import FinishReason, TokenLogprob

__all__ = [
    "AsyncClient",
    "ChatMessage",
    "Client",
    "CompletedChoice",
    "Completion",
    "Event",
    "FinishReason",
    "Finished",
    "Started",
    "TokenChunk",
    "TokenLogprob",
    "Usage",
]
