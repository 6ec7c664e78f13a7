"""The parts of `eval.report` and `eval.plot`: reading run folders and tables, curves, and the HTML page."""
