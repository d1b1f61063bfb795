"""One reader for each format that images come in."""
