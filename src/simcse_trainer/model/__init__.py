"""The sentence encoder: backbone, pooling, heads, and the folder they live in."""
