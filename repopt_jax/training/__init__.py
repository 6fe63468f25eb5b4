"""Training: schedules, the step, the loop, checkpoints and reports."""
