"""Starting a run on one machine or many."""
