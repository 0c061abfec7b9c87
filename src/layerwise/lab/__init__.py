"""The lab: comparisons of per-layer methods with paired seeds, controls and intervals.

Importing this package is cheap; what a command needs beyond PyTorch comes with
``pip install "layerwise[lab]"`` and is imported by the module that uses it.
"""
