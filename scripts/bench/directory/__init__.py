"""The directory: on loopback beside other DHTs, and on virtual time against the targets it is held to."""
