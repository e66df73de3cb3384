"""Recognisers of layouts, one file each: from the files of a folder to tasks.

May import `data` and the files of `init` beside this folder.
"""
