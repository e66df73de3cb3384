"""The YAML file of a run, its validation, and what is built from it: arguments, model and data.

May import `run_folder`, `model`, `tasks`, `balance`, `zero`, `models` and `data`.
"""
