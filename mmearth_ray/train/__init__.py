"""Training: the step, the schedule, checkpoints, the engine, and their launch on Ray Train."""
