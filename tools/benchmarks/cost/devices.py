"""What devices can do, by their makers' data sheets: dense (no sparsity), one direction of a link.

Sources: NVIDIA's data sheets of the H200, H100, A100, L40S and V100 and its Ada whitepaper for the RTX 4090; the
networks are those of the usual machines of eight (DGX and HGX), where there is one.
"""

import difflib
from dataclasses import dataclass

from mpp.errors import UserError


@dataclass(frozen=True)
class Device:
    """One device and how it reaches others; speeds in operations or bytes a second, memory in bytes."""

    half: float
    """bf16 or fp16, accumulated in fp32."""
    single: float
    """fp32; TF32 is off in PyTorch, and here."""
    memory: float
    bandwidth: float
    """Of its own memory."""
    link: float
    """To another device of the machine."""
    network: float
    """Of a whole machine to others."""
    auto: str = "bf16"
    """What train.precision auto means on it."""


DEVICES = {
    # SXM: 989.4 TFLOP/s by the data sheet; large matrix products reach about 790. 141 GB HBM3e; NVLink 4, 900 GB/s both
    # ways; DGX H200: eight ports of 400 Gbit/s.
    "h200": Device(989.4e12, 67e12, 141e9, 4.8e12, 450e9, 400e9),
    # SXM5: the same chip, 80 GB HBM3.
    "h100": Device(989.4e12, 67e12, 80e9, 3.35e12, 450e9, 400e9),
    # SXM4: NVLink 3, 600 GB/s both ways; DGX A100: eight ports of 200 Gbit/s.
    "a100-80": Device(312e12, 19.5e12, 80e9, 2.039e12, 300e9, 200e9),
    "a100-40": Device(312e12, 19.5e12, 40e9, 1.555e12, 300e9, 200e9),
    # PCIe 4.0 x16, 64 GB/s both ways, no NVLink; the network is an assumption, one port of 200 Gbit/s.
    "l40s": Device(362.05e12, 91.6e12, 48e9, 864e9, 32e9, 25e9),
    # 165.2 TFLOP/s with fp32 accumulation. PCIe 4.0 x16 by way of the host; 10 Gbit/s is an assumption.
    "rtx4090": Device(165.2e12, 82.6e12, 24e9, 1.008e12, 32e9, 1.25e9),
    # SXM2 with 32 GB; fp16 alone; NVLink 2, 300 GB/s both ways; DGX-1: four ports of 100 Gbit/s.
    "v100": Device(125e12, 15.7e12, 32e9, 900e9, 150e9, 50e9, "fp16"),
    # Measured, not from a data sheet: large matrix products of two server cores. Memory and links: assumptions.
    "cpu": Device(0.39e12, 0.15e12, 8e9, 20e9, 10e9, 1.25e9, "fp32"),
}


def device_named(name: str) -> Device:
    """The device of that name.

    Raises:
        UserError: none, with the nearest names.
    """
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    near = [known for known in DEVICES if name.lower() in known] or difflib.get_close_matches(name.lower(), DEVICES)
    raise UserError(f"no device {name!r} in the plan's table; take {' or '.join(near or DEVICES)}")
