"""Making it run: loop, optimisers, schedules, checkpoints."""
