"""The logs' tests."""
