"""One run, computed."""
