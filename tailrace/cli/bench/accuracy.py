"""`tailrace bench accuracy`: what int8 weights cost in accuracy, beside what the model's own dtype costs.

Three arms in one process, each with the kernels that serve: float32, the model's dtype, and that with int8 weights.
They see the shipped text in step, once in the chunks of a prefill worker and once token by token as a decode worker
does; then each continues the same prompts greedily.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from tailrace.checkpoint.model_config import ModelConfig, load_model_config
from tailrace.cli.bench.agreement import Pair, TextScores, greedy_agreement
from tailrace.cli.bench.corpus import PROMPTS, TEXT_NAME, shipped_text
from tailrace.cli.bench.engine_loop import EngineLoop, LoopOptions
from tailrace.cli.bench.report import header, print_footer
from tailrace.cli.bench.run import show
from tailrace.cli.bench.teacher_forcing import by_decode, by_prefill
from tailrace.cli.model import fetch_model
from tailrace.cores import available_cores
from tailrace.errors import ConfigError

_REFERENCE = "float32"
_WAYS = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class AccuracyOptions:
    model: str
    dtype: str = "auto"
    """Of the arms beside float32."""
    tokens: int = 1 << 20
    """Of the text, at most."""
    window: int = 1024
    """Tokens; each window of the text is seen by itself."""
    output: int = 64
    """Greedy tokens a prompt."""
    threads: int = 0
    """0: as many as there are cores."""


def run_accuracy(options: AccuracyOptions, *, as_json: bool) -> None:
    """Prints tables, or one JSON object on stdout. Raises ConfigError or CheckpointError for what cannot be loaded."""
    show(measure(options), _print, as_json=as_json)


def measure(options: AccuracyOptions) -> dict[str, Any]:
    """Holds all arms in memory at once: in float32, in the model's dtype, and in that with int8 weights."""
    head = header("accuracy", packages=("tailrace", "torch"))
    directory = fetch_model(options.model)
    config = load_model_config(directory)
    material = _Material.of(directory, options)
    if material.longest > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ConfigError(f"window, or prompt and output: {material.longest} tokens; this model takes {limit}")
    arms = _arms(directory, config, options, material)
    pairs = [Pair(arm, reference) for reference, arm in combinations(arms, 2)]
    scores = {way: _text_scores(way, arms, material.windows, pairs) for way in _WAYS}
    texts = {name: loop.generate(material.prompts, options.output).tokens for name, loop in arms.items()}
    return {
        **head,
        "options": asdict(options),
        "text": material.about,
        "perplexity": {name: {way: round(scores[way].perplexity(name), 4) for way in _WAYS} for name in arms},
        "agreement": [
            {
                **asdict(pair),
                **{way: _rounded(asdict(scores[way].agreement(pair))) for way in _WAYS},
                "greedy": _rounded(asdict(greedy_agreement(texts[pair.arm], texts[pair.reference]))),
            }
            for pair in pairs
        ],
    }


@dataclass(frozen=True, slots=True)
class _Material:
    windows: list[list[int]]
    prompts: list[list[int]]
    longest: int
    """Tokens of the longest sequence, whether seen or generated."""

    @classmethod
    def of(cls, directory: Path, options: AccuracyOptions) -> "_Material":
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokens = tokenizer.encode(shipped_text()).ids[: options.tokens]
        # A last window of one token has nothing to be scored.
        windows = [tokens[first : first + options.window] for first in range(0, len(tokens) - 1, options.window)]
        prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
        return cls(windows, prompts, max(len(windows[0]), max(map(len, prompts)) + options.output))

    @property
    def about(self) -> dict[str, Any]:
        return {
            "name": TEXT_NAME,
            "tokens": sum(map(len, self.windows)),
            "windows": len(self.windows),
            "prompts": len(self.prompts),
        }


def _arms(directory: Path, config: ModelConfig, options: AccuracyOptions, material: _Material) -> dict[str, EngineLoop]:
    """From the most exact to the least."""
    chosen = (config.dtype or "bfloat16") if options.dtype == "auto" else options.dtype
    arms = {_REFERENCE: (_REFERENCE, "none"), chosen: (chosen, "none"), f"{chosen} int8": (chosen, "int8")}
    return {
        name: EngineLoop(
            LoopOptions(
                directory,
                max_batch=max(len(material.windows), len(material.prompts)),
                max_tokens=material.longest,
                threads=options.threads or len(available_cores()),
                dtype=dtype,
                quantization=quantization,
            )
        )
        for name, (dtype, quantization) in arms.items()
    }


def _text_scores(
    way: str, arms: Mapping[str, EngineLoop], windows: Sequence[Sequence[int]], pairs: Sequence[Pair]
) -> TextScores:
    scores = TextScores(pairs)
    scores.add_all(
        {
            name: by_decode(loop.engine, windows)
            if way == "decode"
            else by_prefill(loop.engine, windows, chunk_tokens=loop.options.max_num_batched_tokens)
            for name, loop in arms.items()
        }
    )
    return scores


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}


def _print(result: Mapping[str, Any]) -> None:
    text, options = result["text"], result["options"]
    console = Console()
    table = Table(title=f"{text['name']}, {text['tokens']} tokens in windows of {options['window']}")
    for heading in ("perplexity", *_WAYS):
        table.add_column(heading, justify="left" if heading == "perplexity" else "right")
    for arm, values in result["perplexity"].items():
        table.add_row(arm, *(f"{values[way]:.3f}" for way in _WAYS))
    console.print(table)
    console.print(_agreement_table(result["agreement"]))
    greedy = Table(title=f"{text['prompts']} prompts, {options['output']} greedy tokens each")
    for heading in ("", "tokens before the first difference", "texts without one"):
        greedy.add_column(heading, justify="right" if heading else "left")
    for pair in result["agreement"]:
        values = pair["greedy"]
        greedy.add_row(
            _name(pair), f"{100 * values['tokens_before_difference']:.1f} %", f"{100 * values['equal_texts']:.0f} %"
        )
    console.print(greedy)
    print_footer(console, dict(result))


def _agreement_table(pairs: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="at each token of the text")
    for heading in ("", "by", "perplexity ratio (95 %)", "KL, nats", "same most likely token"):
        table.add_column(heading, justify="right" if len(heading) > 2 else "left")
    for pair in pairs:
        for way in _WAYS:
            values = pair[way]
            low, high = values["perplexity_ratio_low"], values["perplexity_ratio_high"]
            table.add_row(
                _name(pair),
                way,
                f"{values['perplexity_ratio']:.4f} ({low:.4f}-{high:.4f})",
                f"{values['kl_nats']:.4f}",
                f"{100 * values['same_best']:.1f} %",
            )
    return table


def _name(pair: Mapping[str, Any]) -> str:
    return str(Pair(pair["arm"], pair["reference"]))
