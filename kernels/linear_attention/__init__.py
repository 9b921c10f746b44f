"""Linear recurrences with a matrix state: gated linear attention, retention, SSD, linear attention."""
