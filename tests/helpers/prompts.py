"""Twenty prompts of different kinds and lengths, for tests that compare what is generated."""

PROMPTS = (
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
