"""The keeper of one engine: supervises it, announces it, serves it over links."""
