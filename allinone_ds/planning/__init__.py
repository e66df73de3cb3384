"""Memory and traffic of a run, before there is any hardware.

May import `evaluation`, `run_config` and everything below them.
"""
