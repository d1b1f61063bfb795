"""Everything that leaves training."""
