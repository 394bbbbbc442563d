"""Evaluation jobs and the feature cache."""
