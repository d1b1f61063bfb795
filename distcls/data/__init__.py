"""Dataset directories: made by `prepare`, read by everything else."""
