"""Which learning rate, and why: the analysis of a W&B learning-rate sweep."""
