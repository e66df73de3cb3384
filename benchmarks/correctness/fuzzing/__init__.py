"""The parts of `benchmarks.correctness.fuzz`: random programs, their model, how they run, and their reference."""
