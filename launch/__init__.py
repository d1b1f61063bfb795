"""Starting a run on one machine or many: annotated configs for `accelerate launch`."""
