"""containerd for real: a private daemon, pulls, containers."""
