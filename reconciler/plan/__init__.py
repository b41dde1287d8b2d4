"""Manifest and state → plan: what changes, and where it runs. Pure."""
