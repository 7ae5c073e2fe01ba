"""Block-circulant changes: dW = s C(K), evaluated by Fourier transforms of the blocks.

Block (i, j) of C(K) is the circulant matrix whose first row is the kernel K_ij, so that it
correlates: (C(K) x)_i[u] = sum_j sum_t K_ij[(t - u) mod b] x_j[t], a product of spectra.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.tensors import wide


class BlockCirculant(NamedTuple):
    """dW = scale * C(kernel), with the kernel (..., m, n, b) and dW (..., m b, n b)."""

    kernel: Tensor
    scale: float

    def dense(self) -> Tensor:
        """dW, shape (..., out, in)."""
        b = self.kernel.shape[-1]
        turn = torch.arange(b, device=self.kernel.device)
        blocks = self.kernel[..., (turn - turn[:, None]) % b]  # (..., m, n, b, b)
        return self.scale * blocks.transpose(-2, -3).flatten(-2).flatten(-3, -2)

    def apply(self, x: Tensor, scale: float, training: bool, onto: Tensor | None = None) -> Tensor:
        """scale * x dW^T, added to `onto` if that is given."""
        n, b = self.kernel.shape[-2:]
        own = torch.fft.rfft(wide(self.kernel) * (self.scale * scale)).conj()
        spectra = torch.fft.rfft(wide(x).unflatten(-1, (n, b)))
        made = torch.einsum("...nf,mnf->...mf", spectra, own)
        change = torch.fft.irfft(made, n=b).flatten(-2).to(_dtype(x))
        return change if onto is None else onto + change

    def rows(self, ids: Tensor, scale: float, padding: int | None) -> Tensor:
        """scale * dW^T[ids]; `padding` shares its kernels with other rows and is one of them."""
        m, _, b = self.kernel.shape
        kernels = self.kernel.movedim(1, 0).flatten(1) * (self.scale * scale)
        own = F.embedding(ids // b, kernels).unflatten(-1, (m, b))
        turned = (ids[..., None] - torch.arange(b, device=ids.device)) % b
        return own.gather(-1, turned[..., None, :].expand(own.shape)).flatten(-2)


def _dtype(x: Tensor) -> torch.dtype:
    """What a linear map of x would put out."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
