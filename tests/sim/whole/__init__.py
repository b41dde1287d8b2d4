"""The whole of mill in one process: log, state machine, leader loops and agents, by a seed."""
