"""One order for everybody: a replicated log of opaque commands, Raft underneath."""
