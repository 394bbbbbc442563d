"""Built-in plugins, registered through the same entry points that third parties use."""
