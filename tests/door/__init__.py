"""The door: who comes in, with what, and what a flood at it does."""
