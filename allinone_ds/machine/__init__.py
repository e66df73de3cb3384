"""Check whether this machine is ready for a run: versions, accelerators, network, disk and bandwidth.

May import only the modules at the bottom of the package.
"""
