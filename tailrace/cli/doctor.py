"""`tailrace doctor`: is this machine fit, which way does KV move here and how fast, and are the tokens right?"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tailrace.cli.cluster import running_cluster, worker_shares
from tailrace.cli.console import ClusterConsole
from tailrace.cli.figures import describe_transfer
from tailrace.cli.machine_checks import Finding, Verdict, machine_findings
from tailrace.cli.model import fetch_model
from tailrace.cli.openai_stream import Breakdown, ChatClient, ChatOptions, breakdown
from tailrace.cli.pair_rate import PairRate, measure_pair
from tailrace.cli.up import until_signalled
from tailrace.config import UpConfig
from tailrace.cores import this_machine
from tailrace.errors import TailraceError

_STYLES = {Verdict.PASS: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}
_NUM_TOKENS = 24
_TOPICS = ("the sea", "a railway station", "bread", "the number seven", "an old map")
_SENTENCE = "Here is one more plain sentence about {}, so that the prompt fills several blocks. "


@dataclass(frozen=True, slots=True)
class Answers:
    """What one cluster said to the same prompts."""

    texts: tuple[str, ...]
    figures: tuple[Breakdown, ...]
    dtype: str
    quantization: str


class Doctor:
    """Prints each finding as it is made, and remembers whether one was bad."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.found_failure = False

    def say(self, finding: Finding) -> None:
        self.found_failure |= finding.verdict is Verdict.FAIL
        verdict = Text(f"{finding.verdict} ", style=_STYLES[finding.verdict])
        self._console.print(verdict + Text(f"{finding.what}: {finding.detail}", style=""), soft_wrap=True)


def doctor(config: UpConfig) -> int:
    """The exit code: 0 when nothing failed. `config` is used for both clusters, but for their number of workers."""
    console = Console(highlight=False)
    report = Doctor(console)
    for finding in machine_findings(config):
        report.say(finding)
    try:
        report.say(pair_finding(measure_pair(config)))
        model = fetch_model(config.model, config.revision, config.cache_dir)
        report.say(Finding(Verdict.PASS, "model", f"{config.model} in {model}"))
        asyncio.run(until_signalled(_examine(config, model, report, console)))
    except TailraceError as error:
        report.say(Finding(Verdict.FAIL, "serving", error.message))
    return int(report.found_failure)


async def _examine(config: UpConfig, model: Path, report: Doctor, console: Console) -> None:
    of_pair = config.model_copy(update={"prefill": 1, "decode": 1})
    # The number of threads decides in which order attention is added up, and so between tokens that nearly tie.
    threads = min(share.threads for share in worker_shares(of_pair, this_machine()))
    pair = await _answers(of_pair.model_copy(update={"threads": threads}), model, console)
    report.say(Finding(Verdict.PASS, "arithmetic", f"dtype {pair.dtype}, quantization {pair.quantization}"))
    report.say(transfer_finding(pair.figures))
    alone = await _answers(config.model_copy(update={"prefill": 0, "decode": 1, "threads": threads}), model, console)
    report.say(token_finding(pair.texts, alone.texts))


async def _answers(config: UpConfig, model: Path, console: Console) -> Answers:
    async with running_cluster(config, model, ClusterConsole(console, quiet=True)) as cluster:
        key = config.api_key[0].get_secret_value() if config.api_key else ""
        client = ChatClient(ChatOptions(cluster.api_url, key, config.model_names[0]))
        try:
            return await cluster.supervisor.during(_ask(client))
        finally:
            await client.aclose()


async def _ask(client: ChatClient) -> Answers:
    texts, figures = [], []
    for topic in _TOPICS:
        prompt = _SENTENCE.format(topic) * 12
        answer = await client.complete(prompt=prompt, max_tokens=_NUM_TOKENS, temperature=0.0, ignore_eos=True)
        texts.append(answer["choices"][0]["text"])
        figures.append(breakdown(answer["usage"], ttft_s=0.0, latency_s=0.0))
    served = (await client.models())[0]
    return Answers(tuple(texts), tuple(figures), served["dtype"], served["quantization"])


def pair_finding(rate: PairRate) -> Finding:
    """The transport that a pair of this machine proves, and its speed when nothing else runs."""
    pull, memcpy = rate.pull.bytes_per_s, rate.memcpy_bytes_per_s
    detail = f"{rate.pull.transport}, {pull / 1e9:.2f} GB/s; memcpy of one core: {memcpy / 1e9:.2f} GB/s"
    return Finding(Verdict.PASS, "transport of an idle pair", detail)


def transfer_finding(figures: Sequence[Breakdown]) -> Finding:
    """How KV moved while the cluster served.

    The router may well let the decode worker prefill a prompt that it finds cheaper there; some must be handed off.
    """
    moved = [figure for figure in figures if figure.transport]
    if not moved:
        return Finding(Verdict.FAIL, "hand-off", "the decode worker pulled no KV from the prefill worker")
    best = max(moved, key=lambda figure: figure.transfer_bytes_per_s)
    return Finding(Verdict.PASS, "hand-off", f"{len(moved)} of {len(figures)} prompts; {describe_transfer(best)}")


def token_finding(pair: Sequence[str], alone: Sequence[str]) -> Finding:
    """Greedy answers through prefill, hand-off and decode must be those of one process."""
    wrong = [i for i, (left, right) in enumerate(zip(pair, alone, strict=True)) if left != right]
    if not wrong:
        return Finding(Verdict.PASS, "tokens", f"{len(pair)} of {len(pair)} greedy answers equal those of one process")
    first = wrong[0]
    detail = f"{len(wrong)} of {len(pair)} greedy answers differ; P/D: {pair[first]!r}, one process: {alone[first]!r}"
    return Finding(Verdict.FAIL, "tokens", detail)
