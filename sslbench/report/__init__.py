"""Comparison tables and reference checks."""
