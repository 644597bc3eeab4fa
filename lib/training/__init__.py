"""Training: the step, its schedule and log, and the two phases that train."""
