"""The command `init`: look into folders of data and write the YAML file of a first run.

May import `evaluation`, `run_config` and what lies below them.
"""
