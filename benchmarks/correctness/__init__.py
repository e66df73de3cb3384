"""Does balanced training on every kind of engine reach the weights that a float64 reference reaches?"""
