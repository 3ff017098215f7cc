"""Benchmarks that a person runs: what the front door costs and how well it routes, next to its real peers."""
