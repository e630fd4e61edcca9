"""A text against what transformers finds most likely after each of its prefixes.

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
    def compare(self, label: str, prompt: Sequence[int], text: Sequence[int]) -> Comparison:
        """The two up to and with their first difference, which is all that can be compared."""
        logits = self._model(torch.tensor([[*prompt, *text[:-1]]])).logits[0, len(prompt) - 1 :].float()
        best = logits.log_softmax(-1).topk(TOP_COUNT)
        expected: list[int] = best.indices[:, 0].tolist()

        def top(index: int) -> Top:
            return list(zip(best.indices[index].tolist(), best.values[index].tolist(), strict=True))

        index = first_difference(text, expected)
        end = len(text) if index is None else index + 1
        return Comparison(label, text[:end], expected[:end], top)
