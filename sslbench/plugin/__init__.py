"""What a plugin author meets: hooks, contracts, the catalogue."""
