"""Configuration: typed sections, layered TOML files, provenance of every value."""
