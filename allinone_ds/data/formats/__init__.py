"""One file per data format.

May import `data.base` and `data.images`.
"""
