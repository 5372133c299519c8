"""Tuning few parameters of many (seam; see docs/paper_index.md)."""
