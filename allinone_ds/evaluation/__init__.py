"""Metrics over all ranks, predictions of a trained model, test-time views and leaderboards.

May import `run_config`, `run_folder` and the layers below them.
"""
