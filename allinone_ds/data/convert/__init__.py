"""Commands that write labels of public data sets, which are MATLAB files, as label maps and maps.

May import nothing of the package but `errors.py`.
"""
