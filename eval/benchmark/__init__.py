"""The parts of `eval.bench`: steps, and how they are timed."""

ROWS = ("step", "memory", "plain", "outside", "sampling")
FLOW_MATCHING, PLAIN, SEPARATE = "flow matching", "plain", "separate"  # ways of making a step; see steps.Setting
