"""A benchmark from its start to what it shows: a table, or one JSON object on stdout."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from tailrace.cli.up import until_signalled

Result = dict[str, Any]


def show(result: Result, print_table: Callable[[Result], None], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print_table(result)


def measure_and_show(
    work: Coroutine[Any, Any, Result], print_table: Callable[[Result], None], *, as_json: bool
) -> None:
    """Shows nothing when a signal ends the work. Raises what the work raises."""

    async def measured() -> None:
        show(await work, print_table, as_json=as_json)

    asyncio.run(until_signalled(measured()))
