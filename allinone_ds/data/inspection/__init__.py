"""What training could learn nothing from, or would learn wrong, though every sample can be read.

May import `data.base`, `data.images` and `data.formats`.
"""
