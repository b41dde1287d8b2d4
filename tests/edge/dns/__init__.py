"""The name service's tests."""
