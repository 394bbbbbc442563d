"""What to run: typed options, layered composition, the registry of recipes."""
