"""Balancing at the features that the heads read: one forward and one backward through the backbone for any T."""
