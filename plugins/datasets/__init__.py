"""Built-in datasets, one plugin per file."""
