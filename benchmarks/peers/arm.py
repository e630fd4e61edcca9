"""How a runner of one engine talks to compare.py: a line of JSON in, a line of JSON out. Standard library only.

In: {"prompts": [[token ids]], "output_tokens": n}. Out: {"wall_s", "output_tokens", "tokens"}, the last those of the
first prompt. Before, one line says what runs: {"name", "versions", "settings"}.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import TextIO

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Takes prompts and how many tokens each is to be continued by, greedily; gives those tokens."""


def claim_stdout() -> TextIO:
    """The only stream that answers go to. What libraries print to stdout goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(
    answers: TextIO, generate: Generate, *, name: str, packages: tuple[str, ...], settings: dict[str, object]
) -> None:
    """Answer until stdin ends."""
    versions = {package: metadata.version(package) for package in packages}
    _say(answers, {"name": name, "versions": versions, "settings": settings})
    for line in sys.stdin:
        order = json.loads(line)
        began = time.perf_counter()
        continuations = generate(order["prompts"], order["output_tokens"])
        wall_s = time.perf_counter() - began
        count = sum(map(len, continuations))
        _say(answers, {"wall_s": wall_s, "output_tokens": count, "tokens": continuations[0]})


def _say(answers: TextIO, message: dict[str, object]) -> None:
    print(json.dumps(message), file=answers, flush=True)
