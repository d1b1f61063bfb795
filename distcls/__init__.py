"""From a folder of images to a served, verified classifier."""

__version__ = "0.1.0"
