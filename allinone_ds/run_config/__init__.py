"""The YAML file of a run, read strictly, and what is built from it: arguments, model and data.

May import `run_folder`, `model`, `tasks`, `balance`, `zero`, `models` and `data`.
"""
