"""Built-in methods, one plugin per file."""
