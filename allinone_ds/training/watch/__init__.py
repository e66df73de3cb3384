"""What watches a run: signals, stalls, losses that are not finite, memory that runs out."""
