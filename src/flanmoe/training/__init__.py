"""Training on transformers.Trainer with router losses that are right."""
