"""What accuracy is measured on: a text whose every token is scored, and twenty prompts to be continued.

`texts/alice.txt` is chapters I and II of Lewis Carroll's "Alice's Adventures in Wonderland" (1865), which is in the
public domain: a verbatim part, but for its line ends, of the Millennium Fulcrum Edition 2.9, which compression
benchmarks know as alice29.txt, taken from the test data of brotli 1.2.1's source distribution.
"""

from importlib import resources
from typing import Final

TEXT_NAME: Final = "alice.txt"

PROMPTS: Final = (
    "The capital of France is",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "List three fruits: 1.",
    "Q: What is 17 plus 25?\nA:",
    "Dear Ms. Alvarez,\n\nThank you for your letter of 3 March. I am writing to",
    "In 1969, two astronauts",
    "SELECT name, price FROM products WHERE",
    "The three laws of thermodynamics say that",
    "Der schnelle braune Fuchs springt",
    "A recipe for tomato soup. Ingredients:",
    "She opened the door, and",
    "<html>\n  <head>\n    <title>",
    "Photosynthesis is the process by which",
    "To be, or not to be,",
    "Breaking news: scientists have discovered that",
    "1, 2, 4, 8, 16,",
    "The old lighthouse had stood on the cliff for two hundred years. Every evening its keeper, a quiet man with grey "
    "hair, climbed the ninety-one steps to light the lamp. One evening, when the fog lay so thick over the water that "
    "he could not see the rocks below, he heard a voice that seemed to come from the sea itself. It said:",
    "Hello",
)
"""Of different kinds and lengths."""


def shipped_text() -> str:
    return (resources.files(__package__) / "texts" / TEXT_NAME).read_text(encoding="ascii")
