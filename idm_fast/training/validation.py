"""Validation while training: the published protocol on a folder of images, scores for each ratio, and a picture."""

from __future__ import annotations

import torch

from idm_fast.evaluation.protocol import ImageResult, averages, reconstructions
from idm_fast.evaluation.report import ComparisonRow, comparison_figure
from idm_fast.images import list_images, read_luma
from idm_fast.measurements import require_one_block
from idm_fast.models.idm import IDM
from idm_fast.outputs import InputError
from idm_fast.training.config import TrainingConfig

PICTURED = 4
"""Images in the figure; the scores are means over all."""


class Validation:
    """Raises InputError if there are no images, or one cannot be read or is smaller than a block."""

    def __init__(self, config: TrainingConfig) -> None:
        assert config.validation_data_dir is not None
        self.config = config
        self.paths = list_images(config.validation_data_dir)
        for path in self.paths:
            luma = read_luma(path)
            try:
                require_one_block((luma.shape[0], luma.shape[1]), config.block_size)
            except InputError as error:
                raise InputError(f"--validation_data_dir: {path}: {error}") from error

    def run(self, model: IDM, step: int, device: torch.device) -> dict[str, dict[str, float]]:
        """{ratio: {"psnr": dB, "ssim": …}}, ratios as strings; output_dir/validation/ gets a PNG for each ratio."""
        ratios = sorted(set(self.config.cs_ratio))
        return {f"{ratio:g}": self._one_ratio(model, step, device, ratio) for ratio in ratios}

    def _one_ratio(self, model: IDM, step: int, device: torch.device, ratio: float) -> dict[str, float]:
        config = self.config
        results: list[ImageResult] = []
        rows: list[ComparisonRow] = []
        for item in reconstructions(model, self.paths, ratio, config.block_size, config.seed, device):
            results.append(item.result)
            if len(rows) < PICTURED:
                rows.append(ComparisonRow(item.result.name, item.adjoint, item.output, item.original))
        folder = config.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        comparison_figure(rows, folder / f"step-{step:07d}_ratio-{ratio:g}.png")
        means = averages(results)
        return {name: means[name] for name in ("psnr", "ssim")}
