"""``sslbench doctor``: is this installation able to run, and if not, what to type."""
