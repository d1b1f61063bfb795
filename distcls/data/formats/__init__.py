"""One reader per source format of images."""
