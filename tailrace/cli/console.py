"""What a person at the terminal sees of a cluster: children's lines with their names, deaths, progress."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from rich.text import Text

from tailrace.cli.supervisor import Death

_STYLES = {"gateway": "magenta", "prefill": "cyan", "decode": "green", "kvstore": "yellow"}

ProgressCallback = Callable[[str, int, int], None]


class ClusterConsole:
    """Prints what children say, with their names in front; quiet: only what goes wrong. Is a supervisor's Listener."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet

    def line(self, name: str, text: str) -> None:
        if not self._quiet:
            style = _STYLES.get(name.partition("-")[0], "")
            self._console.print(Text(f"{name:<10} | ", style=style) + Text.from_ansi(text), soft_wrap=True)

    def died(self, death: Death, pause_s: float | None) -> None:
        self._console.print(Text(str(death), style="red"), soft_wrap=True)
        if pause_s is not None:
            self._console.print(Text(f"{death.name} is started again in {pause_s:g} s", style="yellow"))


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressCallback]:
    """A callback that shows (what, done, total) as bars on `console`; nothing is shown until it is called."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bars: dict[str, TaskID] = {}
    progress = Progress(*columns, console=console)

    def show(what: str, done: int, total: int) -> None:
        progress.start()
        if what not in bars:
            bars[what] = progress.add_task(what, total=total or None)
        progress.update(bars[what], completed=done, total=total or None)

    try:
        yield show
    finally:
        if bars:
            progress.stop()


def stderr_console() -> Console:
    return Console(file=sys.stderr, highlight=False)
