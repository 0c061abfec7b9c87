"""Intervals and what may be concluded."""
