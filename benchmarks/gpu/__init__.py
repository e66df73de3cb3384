"""What a first GPU must show, in ten minutes: one part per question, each in a process of its own."""
