"""The only folder that touches private fields of DeepSpeed: engines, checkpoints, traces.

May import the modules at the bottom of the package only.
"""
