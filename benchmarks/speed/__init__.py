"""How much time, memory and traffic does balancing cost, beside plain DeepSpeed and other implementations?"""
