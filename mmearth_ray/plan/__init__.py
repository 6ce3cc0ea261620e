"""What a run will take, before a GPU is rented: memory by engine, the micro-batch that fits, steps and time."""
