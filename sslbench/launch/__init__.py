"""Processes of a run: starting them, joining them, handing them to a cluster."""
