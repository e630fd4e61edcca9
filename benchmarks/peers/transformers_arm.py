"""transformers' `generate`, static batch, all prompts of one length. Arguments: model directory, threads."""

import sys

import torch
from arm import claim_stdout, serve
from transformers import AutoModelForCausalLM


def main(model: str, threads: int) -> None:
    answers = claim_stdout()
    torch.set_num_threads(threads)
    decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        out = decoder.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=output_tokens,
            max_new_tokens=output_tokens,
            pad_token_id=0,
        )
        return out[:, tokens.shape[1] :].tolist()

    settings = {"dtype": "bfloat16", "threads": threads, "attention": decoder.config._attn_implementation}
    serve(answers, generate, name="transformers", packages=("transformers", "torch"), settings=settings)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
