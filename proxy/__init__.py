"""The OpenAI-compatible front door: checks keys, chooses a worker, passes bytes through."""
