"""What experts do over a data set (seam; see docs/paper_index.md)."""
