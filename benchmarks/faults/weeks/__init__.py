"""A long run under one fault after another, beside the same run without faults."""
