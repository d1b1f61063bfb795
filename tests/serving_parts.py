"""What a compute process loads (DISTCLS_IMPORT) so that faults really happen in it.

An image that begins with CRASH! ends the process by a signal, one with SLEEP! takes half a second
to decode, and the model cannot compute a batch with a white image.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np

from distcls.errors import DistclsError

compute: Any = sys.modules["__main__"]
usual_decode, usual_infer = compute.decode, compute.infer


def decode(data: bytes, **options: Any) -> Any:
    if data[:6] == b"CRASH!":
        os.abort()
    if data[:6] == b"SLEEP!":
        time.sleep(0.5)
        data = data[6:]
    return usual_decode(data, **options)


def infer(model: Any, indices: range, images: Any, *rest: Any) -> Any:
    if any(np.all(image == 255) for image in images):
        raise DistclsError("a white image")
    return usual_infer(model, indices, images, *rest)


compute.decode, compute.infer = decode, infer
