"""Files that are written whole, opened safely and say what made them."""
