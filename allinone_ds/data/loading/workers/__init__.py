"""What passes between the worker processes of a loader and the process that trains."""
