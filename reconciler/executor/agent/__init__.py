"""Orders to containers, on every node."""
