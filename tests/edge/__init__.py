"""The edge's tests."""
