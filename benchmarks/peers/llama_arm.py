"""llama.cpp, one sequence, through its C interface only. Arguments: a GGUF file, threads."""

import ctypes
import sys

import llama_cpp as lib
from arm import claim_stdout, serve

MAX_TOKENS = 2048


def main(model: str, threads: int) -> None:
    answers = claim_stdout()
    lib.llama_backend_init()
    weights = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = MAX_TOKENS, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(weights, params)
    sampler = lib.llama_sampler_init_greedy()

    def step(tokens: list[int]) -> int:
        array = (lib.llama_token * len(tokens))(*tokens)
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))) != 0:
            raise RuntimeError("llama_decode failed")
        return lib.llama_sampler_sample(sampler, context, -1)

    def generate(prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        if len(prompts) != 1 or len(prompts[0]) > params.n_batch:
            raise ValueError(f"one prompt of at most {params.n_batch} tokens at a time")
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        drawn = [step(prompts[0])]
        while len(drawn) < output_tokens:
            drawn.append(step(drawn[-1:]))
        return [drawn]

    about = ctypes.create_string_buffer(256)
    lib.llama_model_desc(weights, about, len(about))
    settings = {"model": about.value.decode(), "threads": threads}
    serve(answers, generate, name="llama.cpp", packages=("llama-cpp-python",), settings=settings)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
