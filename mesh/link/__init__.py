"""The link: one multiplexed, mutually authenticated connection between two nodes. The fast truth about a worker."""
