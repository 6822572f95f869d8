"""What the studies of ``tools/reproduce`` share: runs of the command line, their results, a search, means, pictures."""
