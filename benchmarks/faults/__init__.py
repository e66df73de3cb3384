"""Does a run lose anything when it is killed, stopped or damaged?"""
