"""Training: from a config to the best model."""
