"""How good an embedding is: semantic textual similarity and, later, transfer and the space."""
