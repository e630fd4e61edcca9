"""The table that says where an answer's time went."""

from rich.table import Table

from tailrace.cli.openai_stream import Breakdown


def breakdown_table(figures: Breakdown) -> Table:
    table = Table("where the time went", "", "", box=None, header_style="bold", pad_edge=False)
    table.columns[1].justify = "right"
    prompt = f"{figures.prompt_tokens} prompt tokens"
    if figures.cached_tokens:
        prompt += f", {figures.cached_tokens} of them cached"
    table.add_row("queue", _ms(figures.queue_s))
    table.add_row("prefill", _ms(figures.prefill_s), prompt)
    table.add_row("transfer", _ms(figures.transfer_s), describe_transfer(figures))
    table.add_row("decode", _ms(figures.decode_s), f"{figures.completion_tokens} output tokens")
    table.add_row("TTFT", _ms(figures.ttft_s), "first content minus send, seen by the client")
    table.add_row("TPOT", _ms(figures.tpot_s), "per output token after the first")
    return table


def describe_transfer(figures: Breakdown) -> str:
    if not figures.transport:
        return "none"
    amount = f"{figures.transfer_bytes / 1e6:.2f} MB over {figures.transport}"
    rate = figures.transfer_bytes_per_s
    return f"{amount}, {rate / 1e9:.2f} GB/s" if rate else amount


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
