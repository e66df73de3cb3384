"""One adapter per kind of DeepSpeed engine, and the choice of the adapter that serves an engine.

May import the other modules of `zero`, except `zero.checkpoint`.
"""
