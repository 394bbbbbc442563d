"""Blocks a method is built from."""
