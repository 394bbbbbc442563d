"""The commands of ``sslbench``: parse, compose, hand over, print. Heavy imports stay inside functions."""
