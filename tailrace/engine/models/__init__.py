"""One data-driven decoder for every served family."""
