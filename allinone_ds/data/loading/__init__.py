"""From datasets to batches: the schedule of tasks, the loaders and their workers, the cache of decoded images."""
