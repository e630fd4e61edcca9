"""Processes of our own that are told what to do by a line of JSON on stdin, and answer by one on stdout."""

import contextlib
import json
import os
import subprocess
import sys
from typing import Any, TextIO

from tailrace.errors import UnavailableError


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    """`python -m module arguments`, to be told what it must know by `tell`."""
    command = [sys.executable, "-m", module, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)  # noqa: S603 - our own module


def tell(process: subprocess.Popen[str], order: object) -> Any:
    """What it answers. Raises UnavailableError with its last words when it ends instead."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise UnavailableError("a measuring process was started without pipes")
    with contextlib.suppress(BrokenPipeError):  # it has ended, and will not answer
        print(json.dumps(order), file=process.stdin, flush=True)
    if line := process.stdout.readline():
        return json.loads(line)
    said = process.stderr.read().strip().splitlines()
    raise UnavailableError(said[-1] if said else "a measuring process ended without a word")


def claim_stdout() -> TextIO:
    """Where answers go. What libraries print to stdout (UCX its warnings) goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def answer(answers: TextIO, message: object) -> None:
    print(json.dumps(message), file=answers, flush=True)
