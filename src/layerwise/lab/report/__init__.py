"""The report of an experiment: one HTML page that needs no network, with its tables beside it."""

from layerwise.lab.report.files import prepare, write

__all__ = ["prepare", "write"]
