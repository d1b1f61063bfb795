"""Where pictures come from: one reader for each kind of source."""
