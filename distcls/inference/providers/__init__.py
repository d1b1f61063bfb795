"""What computes a model on this machine, and how its threads share the work."""
