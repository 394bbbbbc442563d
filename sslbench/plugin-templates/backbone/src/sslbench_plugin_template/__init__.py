"""A plugin of sslbench."""
