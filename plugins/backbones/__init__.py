"""Built-in backbones, one plugin per file."""
