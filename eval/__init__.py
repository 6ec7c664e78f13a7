"""The commands that sample, score, plot, report and measure. Only run.py imports it."""
