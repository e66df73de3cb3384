"""Transforms of samples, the branches of augmentation that a config gives, and which transforms a branch may combine.

May import `data.base`.
"""
