"""Model files run on this machine, without torch."""

import os

# Before ONNX Runtime is imported, which reads it then: from 1.32 on its packages report to their
# makers by default, and keep a number of the device in the user's cache. 0 in the environment lets
# them.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
