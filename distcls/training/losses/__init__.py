"""The loss of each image, and how much each counts."""
