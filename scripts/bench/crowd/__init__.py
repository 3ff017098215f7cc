"""What a crowd of slow and idle connections costs those who are served; see scripts/bench/README.md."""
