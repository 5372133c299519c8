"""Selecting and removing experts (seam; see docs/paper_index.md)."""
