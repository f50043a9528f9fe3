"""Model, statistics and plan → the compressed model, in place."""
