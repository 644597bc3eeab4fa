"""Labels and pseudo-labels: the split, confidence, checks and files."""
