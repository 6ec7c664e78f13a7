"""The parts of `eval.toy2d`: a mixture whose v is a formula, a small network, and the picture."""
