"""Is this machine fit for a run: versions, accelerators, network, disk and bandwidth.

May import the modules at the bottom of the package only.
"""
