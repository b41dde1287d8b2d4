"""HTTP in and out of one node: what a person or a program asks, and what they are told."""
