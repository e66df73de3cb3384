"""Transforms of training samples, the branches that a sample can take, and the transforms that must not meet.

May import `data.base`.
"""
