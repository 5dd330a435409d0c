"""Short programs on real data; each explains itself with --help."""
