"""Scoring tasks through lm-evaluation-harness."""
