"""Artifacts → terminal, Markdown, figures, model card. Never loads a model."""
