"""How fast a key that is taken back stops to work, and what that costs a request."""
