"""What it costs that streams can move."""
