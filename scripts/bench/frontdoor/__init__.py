"""What a front door costs: CPU per request and per token, added latency, streams held, memory, TLS set-up."""
