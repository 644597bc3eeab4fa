"""Batches: which images, read by whom, augmented how."""
