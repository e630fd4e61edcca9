"""The forward pass of a CPU in C: compiled at first use, called once a step."""
