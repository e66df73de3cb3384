"""DeepSpeed's checkpoint files: writing, reading, resharding and consolidating them.

May import the other modules of `zero`.
"""
