"""Where networks can be trained."""

from __future__ import annotations

from layerwise.lab.errors import UsageError


def check_device(name: str, *, here: bool = True) -> None:
    """Refuse a device that PyTorch does not know, or does not find on this machine; nothing is put on it.

    Args:
        name: as ``--device`` has it.
        here: whether it must be on this machine, or another one trains.

    Raises:
        UsageError: no such device.
    """
    if name == "cpu":
        return
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device={name!r} is none of PyTorch's: use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cpu" or not here:
        return
    backend = torch.backends.mps if device.type == "mps" else getattr(torch, device.type, None)
    if backend is None or not backend.is_available():
        raise UsageError(
            f"device={name!r}: PyTorch {torch.__version__} finds none on this machine: use cpu, or install the driver "
            "and the build of PyTorch that it needs"
        )
    count = getattr(backend, "device_count", lambda: 1)()
    if (device.index or 0) >= count:
        raise UsageError(f"device={name!r}: this machine has {count}, counted from 0: use {device.type}:{count - 1}")
