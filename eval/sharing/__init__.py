"""Parts of the command share."""
