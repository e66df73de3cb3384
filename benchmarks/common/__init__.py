"""What several benchmarks share: the machine's description, launching ranks, models, alternating rounds, records."""
