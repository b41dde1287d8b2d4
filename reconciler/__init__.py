"""mill: a team's containers on its own machines, as its git repository says."""
