"""Batch prediction: a resumable job from images to a table."""
