"""From plan to running: the leader's loops, the agents they order, and the container runtime."""
