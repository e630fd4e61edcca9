"""Drawing tokens from logits: the counter-based generator, masks over probabilities, penalties, the draw."""
