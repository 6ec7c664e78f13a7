"""The parts of `eval.bench`: steps, how they are timed, and the figures to reach."""
