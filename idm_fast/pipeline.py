"""IDM as a diffusers pipeline: measurements (or an image to sense) → PIL images, arrays or tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from idm_fast.images import crop, to_uint8

if TYPE_CHECKING:
    from idm_fast.models.idm import IDM


@dataclass
class IDMPipelineOutput(BaseOutput):
    """images: list of PIL images, or (B, H, W) float32 in [0, 1] as a NumPy array or a tensor."""

    images: list[Image.Image] | np.ndarray | Tensor


class IDMPipeline(DiffusionPipeline):
    """Reconstructs luma images from measurements.

        pipe = IDMPipeline(IDM.from_pretrained("weights"))
        physics = BlockCompressedSensing((256, 256), ratio=0.1)
        photo = pipe(measurements=y, physics=physics).images[0]

    `pipe.to("cuda")` moves the model; measurements and operator are moved along at each call.
    """

    model: IDM

    def __init__(self, model: IDM) -> None:
        super().__init__()
        self.register_modules(model=model)

    @torch.no_grad()
    def __call__(
        self,
        measurements: Tensor | None = None,
        image: Tensor | np.ndarray | Image.Image | None = None,
        *,
        physics: Any,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> IDMPipelineOutput | tuple[Any]:
        """Reconstructs `measurements`, or senses `image` with `physics` first; give exactly one of the two.

        Args:
            measurements: y, finite; (B, H·W/N, q) for BlockCompressedSensing.
            image: PIL image (its luma is taken), or (H, W), (1, H, W), (B, 1, H, W) in [0, 1]. If it is smaller than
                `physics.image_size` it is zero-padded to it, and the result is cut back.
            physics: operator with `A` and `A_adjoint` (and `A_dagger` where A Aᵀ ≠ I).
            output_type: "pil", "np" or "pt". The values are clamped to [0, 1].
            return_dict: False returns the tuple `(images,)`.

        Raises ValueError if both or none are given, for NaN or infinite values, and where shapes do not fit.
        """
        if (measurements is None) == (image is None):
            raise ValueError("give exactly one of measurements and image")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}; expected 'pil', 'np' or 'pt'")
        if isinstance(physics, torch.nn.Module):
            physics = physics.to(self.device)
        size = None
        if image is not None:
            x = _as_batch(image)
            size = (x.shape[-2], x.shape[-1])
            measurements = physics.A(_padded(x, physics).to(self.device))
        assert measurements is not None
        y = measurements.to(self.device, torch.float32)
        if not bool(torch.isfinite(y).all()):
            raise ValueError("measurements hold NaN or infinite values")
        was_training = self.model.training
        self.model.eval()
        try:
            x = self.model(y, physics)[:, 0].clamp(0, 1)
        finally:
            self.model.train(was_training)
        x = crop(x, size) if size else x
        images: Any = x
        if output_type == "np":
            images = x.cpu().numpy()
        elif output_type == "pil":
            images = [Image.fromarray(to_uint8(item)) for item in x]
        return IDMPipelineOutput(images=images) if return_dict else (images,)


def _as_batch(image: Tensor | np.ndarray | Image.Image) -> Tensor:
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.asarray(image.convert("L"), np.float32) / np.float32(255))[None, None]
    x = torch.as_tensor(image).float()
    if x.ndim == 4 and x.shape[1] == 1:
        return x
    if x.ndim == 2 or (x.ndim == 3 and x.shape[0] == 1):
        return x.reshape(1, 1, *x.shape[-2:])
    raise ValueError(f"image has shape {tuple(x.shape)}; expected (H, W), (1, H, W) or (B, 1, H, W)")


def _padded(x: Tensor, physics: Any) -> Tensor:
    target = getattr(physics, "image_size", None)
    if target is None:
        return x
    missing = [side - have for side, have in zip(target, x.shape[-2:], strict=True)]
    if min(missing) < 0:
        raise ValueError(f"image is {tuple(x.shape[-2:])}, larger than the {tuple(target)} of physics.image_size")
    return torch.nn.functional.pad(x, (0, missing[1], 0, missing[0]))
