"""The executor's tests."""
