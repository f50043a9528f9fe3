"""Where a result goes: checkpoints that transformers loads, other engines, presets."""
