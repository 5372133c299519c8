"""Arms and seeds: running, comparing, reporting."""
