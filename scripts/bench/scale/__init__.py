"""What `mesh-proxy --processes N` brings."""
