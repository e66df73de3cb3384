"""The shared backbone, the feature pyramid and the heads, as plain modules that know nothing of tasks.

May import the modules at the bottom of the package only.
"""
