"""From bytes to the uint8 array that a network gets: the only implementation of preprocessing.

Training's evaluation pass, `evaluate`, `predict` and the server call this package and no other
code, so a model meets in production exactly what it was measured on.
"""

from distcls.imaging.decode import MAX_PIXELS, Color, decode, decode_file
from distcls.imaging.preprocess import INTERPOLATIONS, RESIZES, Preprocess

__all__ = [
    "INTERPOLATIONS",
    "MAX_PIXELS",
    "RESIZES",
    "Color",
    "Preprocess",
    "decode",
    "decode_file",
]
