"""From embeddings to neighbors, an affinity matrix, its Laplacian and spectrum."""
