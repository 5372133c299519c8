"""The command line: one short file a verb; parses, calls a stage or a study."""
