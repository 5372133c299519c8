"""Tuning few parameters of many: low-rank experts, and the experts that a task uses.

A tuner is put into a model, trains in place of the model's own weights, is saved, and is merged into them or
taken off (`flanmoe.tuners.tuning`). docs/guide/tuners.md says which to use when.
"""
