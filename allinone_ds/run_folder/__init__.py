"""Everything that a run leaves on disk: file names, lock, checkpoints, manifest, weights and event log.

May import `zero` and the modules at the bottom of the package.
"""
