"""What a proxy's memory is for."""
