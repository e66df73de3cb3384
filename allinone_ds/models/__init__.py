"""The shared backbone, the feature pyramid and the heads, as plain modules without tasks.

May import the modules at the bottom of the package only.
"""
