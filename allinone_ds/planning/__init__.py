"""Memory and traffic of a run, computed from its configuration before any hardware is used.

May import `evaluation`, `run_config` and the layers below them.
"""
