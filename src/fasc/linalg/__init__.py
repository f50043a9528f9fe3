"""Tensors in, tensors out: moments, roots, decompositions. Knows no models and no configuration."""
