"""From sources to packed rows."""
