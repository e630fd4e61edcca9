"""`tailrace chat`: a conversation in the terminal."""

import asyncio
import sys

from rich.console import Console

from tailrace.cli.figures import breakdown_table
from tailrace.cli.openai_stream import Breakdown, ChatClient, ChatOptions, Message
from tailrace.errors import TailraceError


def run_chat(options: ChatOptions, *, system: str, once: str, show_stats: bool) -> None:
    """One question (`once`), or question after question until the input ends. Raises TailraceError for `once`."""
    conversation = Conversation(options, system=system, show_stats=show_stats)
    if once:
        asyncio.run(conversation.ask(once))
    else:
        _converse(conversation)


class Conversation:
    """Keeps what was said. A question that failed is forgotten, so that the next one is fine."""

    def __init__(self, options: ChatOptions, *, system: str = "", show_stats: bool = False) -> None:
        self._options = options
        self._show_stats = show_stats
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    async def ask(self, question: str) -> None:
        """Print the answer as it comes."""
        asked = [*self.messages, {"role": "user", "content": question}]
        client = ChatClient(self._options)
        try:
            answer, figures = await print_answer(client, asked)
        finally:
            await client.aclose()
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        if self._show_stats:
            Console(stderr=True, highlight=False).print(breakdown_table(figures))


async def print_answer(client: ChatClient, messages: list[Message]) -> tuple[str, Breakdown]:
    """Print an answer on stdout as it comes; return it, and its figures."""
    pieces: list[str] = []
    figures: Breakdown | None = None
    async for event in client.stream(messages):
        if isinstance(event, Breakdown):
            figures = event
        else:
            pieces.append(event)
            print(event, end="", flush=True)
    print(flush=True)
    if figures is None:
        raise TailraceError("the answer broke off")
    return "".join(pieces), figures


def _converse(conversation: Conversation) -> None:
    print("Ctrl-D ends the conversation.", file=sys.stderr)
    while (question := _read_question()) is not None:
        if question.strip():
            _ask(conversation, question)


def _read_question() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _ask(conversation: Conversation, question: str) -> None:
    try:
        asyncio.run(conversation.ask(question))
    except TailraceError as error:
        print(f"tailrace: {error.message}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n(interrupted)", file=sys.stderr)
