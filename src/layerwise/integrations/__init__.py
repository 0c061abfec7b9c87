"""Callbacks for training frameworks; each module needs its framework installed.

Fabric and Accelerate need none: a `LayerwiseLR` attaches to their optimizers, before or after they are wrapped.
"""
