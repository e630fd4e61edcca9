"""`tailrace bench transfer`: how close a pull is to what limits it.

Two processes that do nothing else move the same blocks in turn: the product's pull over nixl beside memcpy by one
thread, its pull over a stream beside a bare loop of sendmsg and recv_into. Owner and needer have pools larger than
their caches, and each turn takes the blocks whose last turn is longest ago.
"""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.cli.bench.report import Spread, header, print_footer
from tailrace.cli.bench.run import show
from tailrace.cli.bench.transfer_pair import SHAPES
from tailrace.cli.pair_rate import BLOCK_BYTES, order_pair
from tailrace.config import UpConfig

LIMITS = {"nixl": "memcpy", "stream": "socket"}
"""What each transport is held against."""
_MODULE = "tailrace.cli.bench.transfer_pair"


@dataclass(frozen=True, slots=True)
class TransferBenchOptions:
    num_blocks: int = 64
    """Of one pull: a prompt of 1,024 tokens in blocks of 16."""
    block_bytes: int = BLOCK_BYTES
    rounds: int = 20
    num_ranges: int = 12
    """Different sets of blocks: together they should be several times the last cache."""


def run_transfer(config: UpConfig, options: TransferBenchOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises TransferError when no pair can be made."""
    head = header("transfer")
    show(report(head, options, _measure(config, options)), _print, as_json=as_json)


def _measure(config: UpConfig, options: TransferBenchOptions) -> dict[str, Any]:
    transports = [name for name in LIMITS if config.transport in ("auto", name)]
    shared = {"secret": secrets.token_hex(16), "net_device": config.net_device, "transports": transports}
    found: dict[str, Any] = order_pair(_MODULE, {**shared, **asdict(options)})
    return found


def report(head: dict[str, Any], options: TransferBenchOptions, found: dict[str, Any]) -> dict[str, Any]:
    num_bytes = options.num_blocks * options.block_bytes
    return {
        **head,
        "options": asdict(options),
        "bytes_a_pull": num_bytes,
        "not_measured": found["missing"],
        **{shape: _shape(found["seconds"][shape], num_bytes) for shape in SHAPES},
        **{
            f"{name}_over_{limit}": asdict(_worst([_ratio(found["seconds"][shape], name, limit) for shape in SHAPES]))
            for name, limit in LIMITS.items()
            if name in found["seconds"][SHAPES[0]]
        },
    }


def _worst(ratios: Sequence[Spread]) -> Spread:
    return min(ratios, key=lambda ratio: ratio.median)


def _shape(seconds: dict[str, list[float]], num_bytes: int) -> dict[str, Any]:
    rates = {name: Spread.of([num_bytes / s / 1e9 for s in times]) for name, times in seconds.items()}
    return {
        "gb_per_s": {name: asdict(rate) for name, rate in rates.items()},
        **{
            f"{name}_over_{limit}": asdict(_ratio(seconds, name, limit))
            for name, limit in LIMITS.items()
            if name in seconds
        },
    }


def _ratio(seconds: dict[str, list[float]], name: str, limit: str) -> Spread:
    """Of the rates within each round."""
    pairs: Sequence[tuple[float, float]] = list(zip(seconds[name], seconds[limit], strict=True))
    return Spread.of([bare / pull for pull, bare in pairs], digits=3)


def _print(result: dict[str, Any]) -> None:
    options = result["options"]
    table = Table(title=f"{options['num_blocks']} blocks of {options['block_bytes']:,} bytes a pull")
    for column in ("GB/s: median (min-max)", "blocks apart", "one range"):
        table.add_column(column, justify="right")
    for name in result[SHAPES[0]]["gb_per_s"]:
        table.add_row(name, *(str(Spread(**result[shape]["gb_per_s"][name])) for shape in SHAPES))
    for name, limit in LIMITS.items():
        if (key := f"{name}_over_{limit}") in result:
            table.add_row(f"{name} over {limit}", *(f"{result[shape][key]['median']:.2f}" for shape in SHAPES))
    console = Console()
    console.print(table)
    for name, why in result["not_measured"].items():
        console.print(f"{name}: not measured: {why}", markup=False)
    print_footer(console, result)
