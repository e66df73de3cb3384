"""What a user sees of a run: logs, progress, trackers, plots, tables and HTML pages.

May import `planning`, `evaluation`, `run_config`, `run_folder` and everything below them.
"""
