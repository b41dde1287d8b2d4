"""Commits in: repositories are looked at, read in child processes, and followed by the leader."""
