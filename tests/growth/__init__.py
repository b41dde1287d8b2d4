"""What the past leaves behind: nothing that grows with it."""
