"""A checkpoint's files for nodes that lack its folder: who gives them, and how they are read."""
