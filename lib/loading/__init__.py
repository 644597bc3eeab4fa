"""Batches: choice of the images, their reading and their augmentation."""
