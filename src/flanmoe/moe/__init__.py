"""Routing, router losses and expert compute in plain torch."""
