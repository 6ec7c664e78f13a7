"""Everything that turns a recipe into a run folder: config, loop, EMA, checkpoints, processes, metrics."""
