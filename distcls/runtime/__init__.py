"""Model files run on this machine, without torch."""
