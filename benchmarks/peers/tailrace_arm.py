"""Tailrace's engine, as `tailrace bench engine` drives it. Arguments: model directory, threads, quantization."""

import sys
from pathlib import Path

from arm import claim_stdout, serve

from tailrace.cli.bench.engine_loop import EngineLoop, LoopOptions

MAX_BATCH, MAX_TOKENS = 32, 2048


def main(model: str, threads: int, quantization: str) -> None:
    answers = claim_stdout()
    options = LoopOptions(
        Path(model),
        max_batch=MAX_BATCH,
        max_tokens=MAX_TOKENS,
        threads=threads,
        dtype="bfloat16",
        quantization=quantization,
    )
    loop = EngineLoop(options)
    settings = {
        "dtype": options.dtype,
        "quantization": quantization,
        "threads": threads,
        "max_num_batched_tokens": options.max_num_batched_tokens,
    }

    def generate(prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        return loop.generate(prompts, output_tokens).tokens

    serve(answers, generate, name="tailrace", packages=("tailrace", "torch"), settings=settings)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
