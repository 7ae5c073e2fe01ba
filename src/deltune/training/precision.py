"""The arithmetic of forward passes."""

import torch

from deltune.training.settings import Arithmetic, Precision


def resolve(precision: Precision, device: torch.device) -> Arithmetic:
    """What a precision means on a device: "auto" is bf16 where that is native, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if native_bf16(device) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself; emulation is many times slower."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(has is True for name, has in known.items() if "bf16" in name)


def autocast(device: torch.device, arithmetic: Arithmetic) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=arithmetic == "bf16")
