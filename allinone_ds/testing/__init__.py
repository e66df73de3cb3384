"""What tests, benchmarks and the start-up self-test share: a toy model, its float64 reference, cases, a launcher.

May import nothing of the package but `errors`, `strict` and `distributed`.
"""
