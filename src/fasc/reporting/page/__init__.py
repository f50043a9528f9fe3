"""Runs and checkpoints → one HTML page that needs nothing but itself, and its plots as files. Never loads a model."""
