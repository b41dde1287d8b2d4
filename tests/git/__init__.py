"""Proof of `reconciler.git`."""
