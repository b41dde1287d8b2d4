"""Text to manifest: syntax, schema, check, format. Pure: no I/O, clock or randomness."""
