"""The doctor: whether this machine or cluster can carry the run that a configuration describes."""
