"""Parts of the command latency."""
