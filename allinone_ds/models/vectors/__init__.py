"""Heads that predict one vector per image."""
