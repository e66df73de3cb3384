"""Take one gradient per task from the engine and give the engine their weighted sum.

May import `balance.weightings`, the arithmetic of `balance`, and `zero`.
"""
