"""Does balancing improve the trained model? Methods compared over five seeds."""
