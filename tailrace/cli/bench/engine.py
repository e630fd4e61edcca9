"""`tailrace bench engine`: tokens a second of the engine alone, and how far it is from what the machine could do."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tailrace.checkpoint.model_config import ModelConfig, load_model_config
from tailrace.cli.bench.engine_loop import EngineLoop, LoopOptions, RunTimes, StepTimes, random_prompts
from tailrace.cli.bench.probes import MachineLimits, measure_limits
from tailrace.cli.bench.report import Spread, header, percentile, print_footer
from tailrace.cli.bench.run import show
from tailrace.cli.bench.scheduler_load import time_scheduler
from tailrace.cli.model import fetch_model
from tailrace.errors import ConfigError
from tailrace.kv.layout import DTYPE_BYTES

_MANY_SEQUENCES = 256


@dataclass(frozen=True, slots=True)
class EngineBenchOptions:
    model: str
    batch: int = 16
    input: int = 128
    """Prompt tokens a sequence."""
    output: int = 64
    """Output tokens a sequence."""
    threads: int = 1
    dtype: str = "auto"
    quantization: str = "none"
    load_format: str = "auto"
    max_num_batched_tokens: int = 512
    """Of one step, as for a worker."""
    runs: int = 3
    overlap: bool = False
    """Each run once more with overlapped steps, in turn."""
    phases: bool = False
    """Time the phases of each step as well."""
    seed: int = 0


def run_engine(options: EngineBenchOptions, *, as_json: bool) -> None:
    """Prints a table, or one JSON object on stdout. Raises ConfigError or CheckpointError for what cannot be loaded."""
    show(measure(options), _print, as_json=as_json)


def measure(options: EngineBenchOptions) -> dict[str, Any]:
    """A warm-up, the runs, and around them the machine's limits, in the same process and with the same threads."""
    head = header("engine", packages=("tailrace", "torch"))
    model_dir = fetch_model(options.model)
    config = load_model_config(model_dir)
    if options.input + options.output > config.max_position_embeddings:
        raise ConfigError(f"input + output: at most {config.max_position_embeddings} tokens for this model")
    loop = EngineLoop(
        LoopOptions(
            model_dir,
            max_batch=options.batch,
            max_tokens=options.input + options.output,
            threads=options.threads,
            dtype=options.dtype,
            quantization=options.quantization,
            load_format=options.load_format,
            max_num_batched_tokens=options.max_num_batched_tokens,
        )
    )
    if options.phases:
        loop.time_phases()
    prompts = random_prompts(options.batch, options.input, config.vocab_size, seed=options.seed)
    before = measure_limits()
    loop.generate(prompts, options.output)
    runs, overlapped = _in_turn(loop, prompts, options)
    costs = ModelCosts.of(
        config,
        loop.engine.layout.kv_dtype,
        loop.engine.layout.bytes_per_token,
        quantization=options.quantization,
    )
    return {
        **head,
        "options": asdict(options),
        **summarize(runs, costs, before.or_better(measure_limits())),
        **compare(runs, overlapped),
        "scheduler_us_256_sequences": round(statistics.median(time_scheduler(_MANY_SEQUENCES)) * 1e6, 1),
    }


def _in_turn(
    loop: EngineLoop, prompts: Sequence[Sequence[int]], options: EngineBenchOptions
) -> tuple[list[RunTimes], list[RunTimes]]:
    """Runs, and overlapped ones where they were asked for; who begins a round changes."""
    plain: list[RunTimes] = []
    overlapped: list[RunTimes] = []
    for turn in range(options.runs):
        arms = (False, True) if options.overlap else (False,)
        for overlap in arms[:: -1 if turn % 2 else 1]:
            (overlapped if overlap else plain).append(loop.generate(prompts, options.output, overlap=overlap))
    return plain, overlapped


def compare(plain: Sequence[RunTimes], overlapped: Sequence[RunTimes]) -> dict[str, Any]:
    """Overlapped steps over plain ones, in output tokens a second; empty without any."""
    if not overlapped:
        return {}
    ratios = [b.output_tokens_per_s / a.output_tokens_per_s for a, b in zip(plain, overlapped, strict=True)]
    return {
        "overlapped_over_plain": asdict(Spread.of(ratios, digits=4)),
        "overlapped_decode_step": describe_steps(
            [step for run in overlapped for step in run.steps if _only_decodes(step)]
        ),
        "same_tokens": all(a.tokens == b.tokens for a, b in zip(plain, overlapped, strict=True)),
    }


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What a step must read and compute at the least."""

    weight_bytes: int
    """Of every matrix that a step multiplies by: the layers' and the head's."""
    kv_bytes_per_token: int
    flops_per_token: int
    """Of a token's way through the layers, attention apart."""
    flops_per_attended: int
    """Of one token looking at one other, in all layers."""

    @classmethod
    def of(
        cls, config: ModelConfig, dtype: str, kv_bytes_per_token: int, *, quantization: str = "none"
    ) -> "ModelCosts":
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = config.hidden_size * (2 * queries + 2 * keys)
        layers = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
        head = config.vocab_size * config.hidden_size
        return cls(
            weight_bytes=(layers + head) * (1 if quantization == "int8" else DTYPE_BYTES[dtype]),
            kv_bytes_per_token=kv_bytes_per_token,
            flops_per_token=2 * layers,
            flops_per_attended=4 * config.num_layers * queries,
        )

    def bytes_read(self, step: StepTimes) -> int:
        """By a step that only decodes."""
        return self.weight_bytes + step.context_tokens * self.kv_bytes_per_token

    def flops(self, step: StepTimes) -> int:
        """Of a step's prompt tokens; what the head does for their few draws is left out."""
        return step.prompt_tokens * self.flops_per_token + step.attended_tokens * self.flops_per_attended


def summarize(runs: Sequence[RunTimes], costs: ModelCosts, limits: MachineLimits) -> dict[str, Any]:
    """Rates, MBU and MFU of the best run for each; times of steps from all runs together.

    A step with prompt tokens in it counts as prefill, whatever else decodes in it; decode is the steps without.
    """
    best = max(runs, key=lambda run: run.output_tokens_per_s)
    steps = [step for run in runs for step in run.steps]
    return {
        "output_tokens_per_s": round(best.output_tokens_per_s, 2),
        "all_runs_output_tokens_per_s": [round(run.output_tokens_per_s, 2) for run in runs],
        "prefill_tokens_per_s": round(_best_rate(runs, _has_prompt, lambda step: step.prompt_tokens), 2),
        "decode_tokens_per_s": round(_best_rate(runs, _only_decodes, lambda step: step.num_decode), 2),
        "decode_step": describe_steps(list(filter(_only_decodes, steps))),
        "prefill_step": describe_steps(list(filter(_only_prefills, steps))),
        "mbu_decode": round(_best_rate(runs, _only_decodes, costs.bytes_read) / limits.stream_bytes_per_s, 4),
        "mfu_prefill": round(_best_rate(runs, _only_prefills, costs.flops) / limits.gemm_flops_per_s, 4),
        "limits": {
            "stream_gb_per_s": round(limits.stream_bytes_per_s / 1e9, 2),
            "bf16_gemm_gflops": round(limits.gemm_flops_per_s / 1e9, 1),
        },
        "weight_bytes": costs.weight_bytes,
        "kv_bytes_per_token": costs.kv_bytes_per_token,
    }


def describe_steps(steps: Sequence[StepTimes]) -> dict[str, Any]:
    """Host overhead: what of a step is neither the model's forward pass nor its logits."""
    if not steps:
        return {"count": 0}
    times = [step.step_s for step in steps]
    return {
        "count": len(steps),
        "p50_ms": round(percentile(times, 0.5) * 1e3, 3),
        "p99_ms": round(percentile(times, 0.99) * 1e3, 3),
        "host_overhead": round(statistics.median((s.step_s - s.model_s) / s.step_s for s in steps), 4),
        "host_overhead_ms": round(statistics.median(s.step_s - s.model_s for s in steps) * 1e3, 3),
        "scheduler_us": round(statistics.median(s.scheduler_s for s in steps) * 1e6, 1),
        "phases_ms": {
            phase: round(statistics.median(s.phases_s[phase] for s in steps) * 1e3, 3) for phase in steps[0].phases_s
        },
    }


def _has_prompt(step: StepTimes) -> bool:
    return step.prompt_tokens > 0


def _only_prefills(step: StepTimes) -> bool:
    return step.prompt_tokens > 0 and not step.num_decode


def _only_decodes(step: StepTimes) -> bool:
    return not step.prompt_tokens


def _best_rate(
    runs: Sequence[RunTimes], which: Callable[[StepTimes], bool], amount: Callable[[StepTimes], float]
) -> float:
    """The best run's amount a second over its steps of a kind; 0 where there is none of that kind."""
    kept = [[step for step in run.steps if which(step)] for run in runs]
    return max((sum(map(amount, steps)) / sum(s.step_s for s in steps) for steps in kept if steps), default=0.0)


def _print(result: dict[str, Any]) -> None:
    options, decode, prefill = result["options"], result["decode_step"], result["prefill_step"]
    title = f"{options['batch']} x ({options['input']} in, {options['output']} out), {options['threads']} threads"
    if options["quantization"] != "none":
        title += f", {options['quantization']} weights"
    table = Table("", "", title=title, show_header=False)
    table.columns[1].justify = "right"
    all_runs = ", ".join(f"{rate:.1f}" for rate in result["all_runs_output_tokens_per_s"])
    table.add_row("output tokens/s, prefill included", f"{result['output_tokens_per_s']:.1f} of {all_runs}")
    table.add_row("prefill tokens/s", f"{result['prefill_tokens_per_s']:.1f}")
    table.add_row("decode tokens/s", f"{result['decode_tokens_per_s']:.1f}")
    for name, step in (("decode", decode), ("prefill", prefill)):
        if step["count"]:
            table.add_row(f"{name} step, ms: p50 / p99", f"{step['p50_ms']:.2f} / {step['p99_ms']:.2f}")
            table.add_row(f"{name} step, host overhead", f"{step['host_overhead']:.1%}")
            table.add_row(f"{name} step, scheduler, us", f"{step['scheduler_us']:.0f}")
            for phase, phase_ms in step["phases_ms"].items():
                table.add_row(f"{name} step, {phase}, ms", f"{phase_ms:.2f}")
    if overlapped := result.get("overlapped_over_plain"):
        table.add_row("overlapped steps over plain ones", f"{Spread(**overlapped)}")
    table.add_row("scheduler at 256 sequences, us", f"{result['scheduler_us_256_sequences']:.0f}")
    limits = result["limits"]
    table.add_row(f"decode MBU, of {limits['stream_gb_per_s']:.1f} GB/s", f"{result['mbu_decode']:.3f}")
    table.add_row(f"prefill MFU, of {limits['bf16_gemm_gflops']:.0f} GFLOP/s", f"{result['mfu_prefill']:.3f}")
    console = Console()
    console.print(table)
    print_footer(console, result)
