"""Shipped for plug-in authors: tiny models, contract checks, strategies."""
