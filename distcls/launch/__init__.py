"""Starting training elsewhere: searches, checks before a job, Ray."""
