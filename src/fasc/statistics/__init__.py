"""Moments of the inputs and gradients of a model's layers: measured, merged, kept in a file."""
