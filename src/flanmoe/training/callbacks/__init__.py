"""What is told about every optimizer step; one file a concern, each with state that survives resume."""
