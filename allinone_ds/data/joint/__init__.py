"""Images with labels for several tasks: their datasets and sources, and batches of them.

May import the rest of `data`.
"""
