"""Small probes against the installed transformers, TRL and PEFT, and against one model."""
