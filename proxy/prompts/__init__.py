"""Prompts and answers of endpoints whose documents ask for them to be kept: redacted, sealed, written, forgotten. Nothing else is kept."""
