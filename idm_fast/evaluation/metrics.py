"""PSNR and SSIM as published results of compressed sensing are computed.

Images are (H, W) or (C, H, W), the reference in [0, 1], padding already cut off. The reconstruction is clamped to
[0, 1] and not rounded to 8 bits. Data range 1 here and 255 in the published code give the same numbers.
"""

from __future__ import annotations

import math

import numpy as np
from skimage.metrics import structural_similarity
from torch import Tensor


def psnr(x: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all pixels and channels; infinite for equal images.

    Raises ValueError if the shapes differ.
    """
    image, truth = _pair(x, reference)
    error = float(np.mean((image - truth) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(x: Tensor, reference: Tensor) -> float:
    """scikit-image's structural similarity: 7×7 uniform window, mean over channels. Both sides must be at least 7.

    Raises ValueError if the shapes differ or a side is under 7.
    """
    image, truth = _pair(x, reference)
    return float(structural_similarity(image, truth, data_range=1.0, channel_axis=0 if image.ndim == 3 else None))


def _pair(x: Tensor, reference: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if x.shape != reference.shape or x.ndim not in (2, 3):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and reference {tuple(reference.shape)}; "
            "expected the same, (H, W) or (C, H, W)"
        )
    return _array(x.clamp(0, 1)), _array(reference)


def _array(image: Tensor) -> np.ndarray:
    return image.detach().double().cpu().numpy()
