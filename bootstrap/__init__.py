"""The well-known entry point: a seed of the directory and the place where nodes enrol."""
