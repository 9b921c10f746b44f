"""Reports on runs: what is in them, curves, tables, and the pages that show both."""
