"""Streams that outlive their worker: telling along the way what a successor needs, and being the successor.

`movable` says of which requests an engine's answer can be gone on with exactly, `ids` how each kind of engine tells its token ids, `trail`
is what travels, `tracked` takes it off an engine's events, `resume` goes on where another worker's trail ends.
"""
