"""A trained model in use: embeddings, similarities, and an index to search."""
