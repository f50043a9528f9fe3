"""The only folder that knows transformers: loading, input groups, low-rank modules, checkpoints."""
