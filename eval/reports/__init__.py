"""The parts of `eval.report`: what is read of a run folder or table, and the HTML that it becomes."""
