"""Networks: built by name, with pretrained weights, saved to and loaded from checkpoints."""
