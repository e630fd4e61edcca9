"""Texts against what transformers finds most likely after each of their prefixes.

Up to the first difference that is the reference's own greedy text, by induction, for one pass a prompt.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from tests.helpers.neartie import TOP_COUNT, Comparison, Top, first_difference


class Reference:
    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

    @torch.inference_mode()
    def tops(self, prompt: Sequence[int], text: Sequence[int]) -> list[Top]:
        """For each token of `text`, the most likely ones in its place."""
        logits = self._model(torch.tensor([[*prompt, *text[:-1]]])).logits[0, len(prompt) - 1 :].float()
        best = logits.log_softmax(-1).topk(TOP_COUNT)
        return [
            list(zip(ids, values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def compare(self, label: str, prompt: Sequence[int], text: Sequence[int]) -> Comparison:
        """The two up to and with their first difference, which is all that can be compared."""
        tops = self.tops(prompt, text)
        expected = [top[0][0] for top in tops]
        index = first_difference(text, expected)
        end = len(text) if index is None else index + 1
        return Comparison(label, text[:end], expected[:end], tops.__getitem__)

    def judge(self, label: str, prompt: Sequence[int], actual: Sequence[int], expected: Sequence[int]) -> Comparison:
        """Two texts of others."""
        return Comparison(label, actual, expected, lambda index: self.tops(prompt, expected)[index])
