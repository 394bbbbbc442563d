"""Built-in evals, one plugin per file."""
