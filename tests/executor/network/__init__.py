"""The network's tests."""
