"""Heads that predict something for each object of an image: its points or its mask."""
