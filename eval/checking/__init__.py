"""The parts of `eval.check`: what is tried on a new machine."""
