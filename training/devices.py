"""Peak arithmetic of accelerators, to judge how much of it a training uses."""

import torch

# Dense half-precision FLOP/s, without sparsity, from the vendors' data sheets; the first name that fits counts.
_PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the FLOP/s of half-precision matrix products, or None if the device is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for known, flops in _PEAK_FLOPS.items() if known in name), None)
