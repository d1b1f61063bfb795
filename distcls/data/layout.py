"""Names of the files of a dataset directory; what is in them says `distcls.data.dataset`."""

from __future__ import annotations

FORMAT = 1
MANIFEST, CLASSES, INFO, PACK = "manifest.parquet", "classes.json", "dataset.json", "pack.bin"
