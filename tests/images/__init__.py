"""Real images and real registries, for the tests and for the demo."""
