"""Extraction of embeddings from images."""
