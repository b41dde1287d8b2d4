"""Machines for tests: network namespaces of one host that stand for them, and what they prove."""
