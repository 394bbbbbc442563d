"""Runs of several processes: starting them, joining them, and starting them again after one of them has died."""
