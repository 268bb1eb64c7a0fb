"""IDM: the diffusion sampler as a reconstruction network (DESIGN §1; Chen et al., TPAMI 2025)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from idm_fast.memory.count import resident_threads
from idm_fast.memory.planner import Planner, options_of, parse_bytes
from idm_fast.memory.schedule import Schedule, keep_for, schedule_for
from idm_fast.models import convert
from idm_fast.models.layers import Conv2d, Linear
from idm_fast.models.sampling import SamplingStep, step_runs
from idm_fast.models.unet import UNet
from idm_fast.ops.registry import OPS
from idm_fast.reversible.backprop import Call, plain_chain
from idm_fast.reversible.casts import cast_once
from idm_fast.reversible.constant import Constant
from idm_fast.reversible.coupling import ConvexCoupling
from idm_fast.reversible.sequence import SMALLEST_V, invertible_chain, smallest, smallest_v, values_can_be_read

TINY = {"widths": (24, 48), "heads": 4, "norm_groups": 8, "attention": (False, False)}
"""What makes `IDM.tiny`: narrow, and without attention, which would take a quarter to half of a step's time on a CPU."""


class IDM(ModelMixin, ConfigMixin):
    """x_T = √ᾱ_T·Aᵀy, then T sampling steps, each one U-Net call and one projection onto the measurements; no noise.

    `torch.compile(model, fullgraph=True)` serves inference, and training under every schedule, which the graph follows; in
    training the operator must then be an nn.Module.

    Args:
        steps: T ≥ 1.
        widths: U-Net channels at half and quarter image size; multiples of 4 and 16.
        heads: of every attention. norm_groups: of every GroupNorm.
        attention: whether the U-Net attends at half and at quarter image size.
        schedule: what backward has: "store" is plain autograd, "flat" inverts the layers inside every step, "two_level" also
            recomputes the steps; see `idm_fast.memory.schedule_for`.
        keep: what is stored besides: "attention" (its outputs), and for "two_level" "steps" (the default: the two one-channel
            images before each step; without it they are recovered by inversion, as published).
        stream_dtype: "float32" or "float64", what the streams of the chains inside the U-Net are kept in; None: float32 under
            autocast, and float64 outside, where inverting in float32 would add to the rounding of the network.
        memory_budget: bytes of activations that a training step may take, as "12GiB"; then the first training step of every
            batch, image size and autocast dtype plans the schedule with the fewest FLOP that fits (some seconds at full size)
            and `schedule` and `keep` do not count; see `idm_fast.memory.planner`. What is counted is what runs: ops without a
            kernel in use on the device with all that plain PyTorch holds in them. None: no planning.
        trained_ratios, block_size, sensing_seed: what the weights were trained for, written by the trainer.

    Raises:
        ValueError: an argument out of range.
    """

    config_name = "config.json"
    _keep_in_fp32_modules = None

    @register_to_config
    def __init__(
        self,
        steps: int = 3,
        widths: tuple[int, int] = (320, 640),
        heads: int = 8,
        norm_groups: int = 32,
        attention: tuple[bool, bool] = (True, True),
        schedule: str = "two_level",
        keep: Collection[str] | None = None,
        stream_dtype: str | None = None,
        trained_ratios: list[float] | None = None,
        block_size: int | None = None,
        sensing_seed: int | None = None,
        memory_budget: str | int | None = None,
    ) -> None:
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps: {steps} is not positive")
        if widths[0] % 4 or widths[1] % 16 or any(width % norm_groups for width in widths):
            raise ValueError(f"widths: {tuple(widths)} must be multiples of 4 and 16, and both of norm_groups={norm_groups}")
        # No body draws random numbers, and `check_parameters` looks at every v at once.
        streams = None if stream_dtype is None else getattr(torch, stream_dtype)
        chain_options = {"stream_dtype": streams, "preserve_rng_state": False, "check_v": False}
        self.unet = UNet(
            (widths[0], widths[1]), steps, heads, norm_groups, (attention[0], attention[1]), chain_options
        )
        self.input_scale = nn.Parameter(torch.ones(1))
        self.merge_scale = nn.Parameter(torch.zeros(1))
        self.alpha = nn.Parameter(torch.full((steps,), 0.5))
        self.v = nn.ParameterList(nn.Parameter(torch.full((1,), 0.5)) for _ in range(steps))
        self._coupling = Constant(ConvexCoupling())
        self.set_schedule(schedule, keep)
        self.memory_budget = memory_budget

    def set_schedule(self, schedule: str, keep: Collection[str] | None = None) -> None:
        """Choose a schedule by name with what it keeps, at any time; arguments and errors as in the constructor."""
        self._keep = keep_for(schedule, keep)
        self._schedule_name = schedule
        self._keep_steps = schedule != "two_level" or "steps" in self._keep
        self._set_plan(schedule_for(schedule, keep, len(self.v)))

    def _set_plan(self, plan: Schedule) -> None:
        self._plan, self._runs = plan, step_runs(plan)

    @property
    def schedule(self) -> str:
        """"store", "flat" or "two_level", or "planned"; setting it keeps of `keep` what the new schedule can keep."""
        return self._schedule_name

    @schedule.setter
    def schedule(self, schedule: str) -> None:
        self.set_schedule(schedule)

    @property
    def keep(self) -> frozenset[str]:
        """What is stored besides; see the class."""
        return self._keep

    @keep.setter
    def keep(self, keep: Collection[str] | None) -> None:
        self.set_schedule(self._schedule_name, keep)

    @property
    def plan(self) -> Schedule:
        """The schedule in full, step by step; may be set to one made by hand or by the planner."""
        return self._plan

    @plan.setter
    def plan(self, plan: Schedule) -> None:
        if len(plan) != len(self.v):
            raise ValueError(f"plan: it has {len(plan)} steps, and the model {len(self.v)}")
        self._schedule_name, self._keep, self._keep_steps = "planned", frozenset(), True
        self._set_plan(tuple(plan))

    @property
    def memory_budget(self) -> int | None:
        """Bytes of activations that a training step may take; may be set as in the constructor, None to plan no more."""
        return self._budget

    @memory_budget.setter
    def memory_budget(self, budget: str | int | None) -> None:
        self._budget = None if budget is None else parse_bytes(budget)
        self._planned: dict[tuple[Any, ...], Schedule] = {}

    @classmethod
    def tiny(cls, steps: int = 3, **overrides: Any) -> IDM:
        """A network that a CPU trains in minutes: the same wiring, narrow and without attention (`TINY`)."""
        return cls(steps=steps, **(TINY | overrides))

    @classmethod
    def from_stable_diffusion(cls, path_or_id: str, steps: int = 3, **overrides: Any) -> IDM:
        """Start from the U-Net of a Stable Diffusion 1.x model: a local folder in diffusers' format, or a hub id.

        Only the folder `unet` is read, from safetensors. What SD 1.5 does not have (injectors, v, scales, α) is fresh.

        Raises:
            ValueError: the U-Net is no Stable Diffusion 1.x one. OSError: nothing there.
        """
        state, options = convert.read_stable_diffusion(path_or_id)
        model = cls(steps=steps, **(options | overrides))
        convert.load_stable_diffusion(model, state)
        return model

    @classmethod
    def from_published(cls, path: str, **overrides: Any) -> IDM:
        """Read a checkpoint of the published code (`net_params_50.pkl`); T and the widths are taken from its shapes.

        The file is read with weights_only=True: a pickle that holds anything but tensors is refused and never executed.

        Raises:
            ValueError: unreadable, unsafe, or keys or shapes that are not IDM's (they are named).
        """
        state = convert.read_published(path)
        model = cls(**(convert.published_options(state) | overrides))
        convert.load_published(model, state)
        return model

    def save_published(self, path: str) -> None:
        """Write the weights under every key that the published code's state dict has, aliases included."""
        convert.save_published(self, path)

    def check_parameters(self) -> None:
        """Raise ValueError when an α left (0, 1) or a v came too near 0 to be inverted; it names the parameter."""
        # All at once, as a GPU is waited for with every reading.
        read = torch.cat([self.alpha.detach(), *(v.detach() for v in self.v)]).tolist()
        alpha, outer = read[: len(self.alpha)], read[len(self.alpha) :]
        if not all(0 < a < 1 for a in alpha):
            raise ValueError(
                f"alpha: {alpha} has left (0, 1), where √ᾱ and √(1−ᾱ) exist; "
                "lower the learning rate, or clip gradients, and resume from an earlier checkpoint"
            )
        inner_name, inner = smallest_v(self.unet)
        name, value = smallest({f"v.{t}": abs(v) for t, v in enumerate(outer)} | {f"unet.{inner_name}": inner})
        if not value >= SMALLEST_V:
            raise ValueError(
                f"{name}: |v| = {value:.3g} is below {SMALLEST_V}, and inverting the layer divides by v; "
                "lower the learning rate, or clip gradients, and resume from an earlier checkpoint"
            )

    def forward(self, y: Tensor, physics: Any) -> Tensor:
        """Reconstruct.

        Args:
            y: measurements; for BlockCompressedSensing (B, H·W/N, q), in the dtype of the operator's matrix.
            physics: the operator: `A`, `A_adjoint`, and `A_dagger` where A Aᵀ ≠ I. It must return images (B, 1, H, W) with
                H and W multiples of 4.

        Returns:
            (B, 1, H, W), unclamped.

        Raises:
            ValueError: an image size that the U-Net cannot halve twice; in training, parameters out of range.
        """
        if self.training and torch.is_grad_enabled() and values_can_be_read(self.alpha):
            self.check_parameters()
        aty = physics.A_adjoint(y)
        if aty.ndim != 4 or aty.shape[1] != 1 or aty.shape[2] % 4 or aty.shape[3] % 4:
            raise ValueError(f"physics: A_adjoint(y) is {tuple(aty.shape)}, expected (B, 1, H, W) with H and W multiples of 4")
        if self._budget is not None and self.training and torch.is_grad_enabled() and values_can_be_read(self.alpha):
            self._plan_for(aty, self._budget)
        # One by one: the gradient of cumprod looks for zeros, and waits for a GPU to tell.
        abar = [torch.ones_like(self.alpha[0]), *accumulate(self.alpha.unbind(), torch.mul)]
        x = abar[-1].sqrt() * aty
        with self._weights_cast_once(x):
            return self._sample(x, y, aty, abar, physics)

    def _plan_for(self, aty: Tensor, budget: int) -> None:
        device = aty.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        height, width = (-(-side // 32) * 32 for side in aty.shape[2:])  # what the planner counts is sensed in blocks of 32²
        # Kernels allocate what they return; plain PyTorch holds more on its way there.
        plain = tuple(name for name, op in OPS.items() if op.runs_reference(device))
        gpu = resident_threads(aty.device)
        key = (aty.shape[0], height, width, autocast, plain, gpu)
        if key not in self._planned:
            options = options_of(self)

            def make_model(steps: int) -> IDM:
                return type(self)(**options | {"steps": steps})

            planner = Planner(make_model, aty.shape[0], (height, width), autocast=autocast, as_reference=plain, threads=gpu)
            plan = planner.plan(len(self.v), budget)
            self._planned[key] = plan.schedule
            logging.getLogger(__name__).info("batch %d, %d×%d: %s; %s", *key[:3], plan.choice, plan.count)
        self.plan = self._planned[key]

    def _weights_cast_once(self, x: Tensor) -> AbstractContextManager[None]:
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(x.device.type):
            return nullcontext()
        parts: list[nn.Module] = [*self.unet.down_blocks, *self.unet.up_blocks, self.unet.conv_in, self.unet.conv_out]
        layers = [[m for m in part.modules() if isinstance(m, (Conv2d, Linear))] for part in parts]
        return cast_once(
            ([w for layer in group for w in (layer.weight, layer.bias) if w is not None] for group in layers),
            torch.get_autocast_dtype(x.device.type),
        )

    def _sample(self, x: Tensor, y: Tensor, aty: Tensor, abar: list[Tensor], physics: Any) -> Tensor:
        x1, x2 = x, self.input_scale * x
        weights = list(self.v)
        for recompute, bodies in self._runs:
            run: Callable[..., tuple[Tensor, Tensor, list[Tensor]]] = plain_chain
            if recompute and torch.is_grad_enabled():
                run = partial(invertible_chain, bodies, self._coupling, keep=self._keep_steps, preserve_rng_state=False)
            steps = cast(list[SamplingStep], list(bodies.value))
            calls = [Call(step, (self.unet, physics, y, aty, abar[step.t], abar[step.t - 1])) for step in steps]
            own, weights = weights[: len(steps)], weights[len(steps) :]
            x1, x2, _ = run(calls, self._coupling.value, own, x1, x2, body_dtype=x.dtype)
        return x1 + self.merge_scale * x2
