"""Measurements behind the figures of README.md and docs/. Run each as a module from the root of the checkout."""
