"""Command and state to state: what the log means. Pure: no I/O, clock or randomness."""
