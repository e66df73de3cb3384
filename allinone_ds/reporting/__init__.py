"""What a user sees of a run: logs, progress, trackers, plots, tables and HTML pages.

May import `planning`, `evaluation`, `run_config`, `run_folder` and the layers below them. Names of logged values are in
logs.py; W&B and TensorBoard keys are in trackers.py.
"""
