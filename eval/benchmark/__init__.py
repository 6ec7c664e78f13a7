"""The parts of `eval.bench`: steps, how they are timed, and the figures to reach."""

ROWS = ("step", "memory", "plain", "outside", "sampling")
FLOW_MATCHING, PLAIN, SEPARATE = "flow matching", "plain", "separate"  # ways of making a step; see steps.Setting
