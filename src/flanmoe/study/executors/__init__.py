"""Executors: where the legs of a study run, one file each."""
