"""What a rank and the command that started it tell each other: why a rank failed, and that the command has ended.

Imports no torch.
"""
