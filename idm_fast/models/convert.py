"""Weights of Stable Diffusion 1.x and of the published IDM code, under this package's names and back.

Below a block, names differ by prefix only. The published state dict holds the tensors of a chain twice: once under the block
(`resnets.0…`, `injectors.1…`, `attentions.0…`) and once under the chain (`rev_module_lists.0.2.body…`).
"""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from idm_fast.models.injector import Injector
from idm_fast.models.unet import DownBlock, ResnetBlock, SpatialTransformer, UpBlock
from idm_fast.reversible import ReversibleSequence

if TYPE_CHECKING:
    from idm_fast.models.idm import IDM

_SD_UP_BLOCK_SHIFT = 2
"""Up blocks 0 and 1 here are 2 and 3 of SD 1.5: the two lowest resolutions are removed."""


def published_names(model: IDM) -> dict[str, list[str]]:
    """Parameter name here → names in the published state dict: the first one, then its alias when it has one."""
    prefixes = _module_prefixes(model)
    names = {}
    for name, _ in model.named_parameters():
        own = _TOP.get(name)
        if own is None:
            prefix = max((p for p in prefixes if name.startswith(p)), key=len)
            rest = _rename_inside(name[len(prefix) :])
            names[name] = [published + rest for published in prefixes[prefix]]
        else:
            names[name] = [own]
    return names


_TOP = {"input_scale": "input_help_scale_factor", "merge_scale": "merge_scale_factor", "alpha": "alpha"}


def _module_prefixes(model: IDM) -> dict[str, list[str]]:
    """Prefix here → prefixes in the published state dict. The longest prefix that fits a name is the right one."""
    prefixes = {"unet.": ["unet."]} | {f"v.{i}": [f"body.{i}.v"] for i in range(len(model.v))}
    for i, block in enumerate(model.unet.down_blocks):
        assert isinstance(block, DownBlock)
        here = f"unet.down_blocks.{i}."
        prefixes[f"{here}input_scale"] = [f"{here}input_help_scale_factor"]
        prefixes[f"{here}merge_scales"] = [f"{here}merge_scale_factors"]
        prefixes[f"{here}downsampler."] = [f"{here}downsamplers.0.conv."]
        first = block.first_part
        places = [(0, k) if k < first else (1, k - first) for k in range(len(block.chain.bodies))]
        layers = [f"{here}rev_module_lists.{j}.{k}." for j, k in places]
        prefixes |= _chain_prefixes(here, block.first_resnet is not None, f"{here}chain.", layers, block.chain)
    for i, block in enumerate(model.unet.up_blocks):
        assert isinstance(block, UpBlock)
        here = f"unet.up_blocks.{i}."
        prefixes[f"{here}chain.input_scale"] = [f"{here}input_help_scale_factor"]
        prefixes[f"{here}chain.merge_scale"] = [f"{here}merge_scale_factor"]
        prefixes[f"{here}upsampler."] = [f"{here}upsamplers.0.conv."]
        layers = [f"{here}rev_module_list.{k}." for k in range(len(block.chain.chain.bodies))]
        prefixes |= _chain_prefixes(here, True, f"{here}chain.chain.", layers, block.chain.chain)
    return prefixes


def _chain_prefixes(
    here: str, has_first_resnet: bool, own: str, layers: list[str], chain: ReversibleSequence
) -> dict[str, list[str]]:
    """`own`: prefix of the chain here; `layers`: published prefix of each of its layers."""
    prefixes = {f"{here}first_resnet.": [f"{here}resnets.0."]} if has_first_resnet else {}
    count = {ResnetBlock: int(has_first_resnet), Injector: 0, SpatialTransformer: 0}
    folder = {ResnetBlock: "resnets", Injector: "injectors", SpatialTransformer: "attentions"}
    for k, (body, layer) in enumerate(zip(chain.bodies, layers, strict=True)):
        kind = type(body)
        first = f"{here}{folder[kind]}.{count[kind]}."
        count[kind] += 1
        prefixes[f"{own}bodies.{k}."] = [first, f"{layer}body."]
        prefixes[f"{own}v.{k}"] = [f"{layer}v"]
    return prefixes


def _rename_inside(rest: str) -> str:
    rest = re.sub(r"^read\.(\d+)\.", r"f2i.\1.1.", rest)
    return re.sub(r"^write\.(\d+)\.", r"i2f.\1.0.", rest)


def read_published(path: str) -> dict[str, Tensor]:
    """The state dict in `path`, read without executing anything; ValueError when it is not one."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a state dict that can be read safely ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{path}: holds {type(state).__name__}, expected a dict of tensors")
    return state


def published_options(state: dict[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of the IDM whose published state dict this is; ValueError when it is none."""
    try:
        return {
            "steps": state["alpha"].shape[0],
            "widths": (
                state["unet.conv_in.weight"].shape[0],
                state["unet.down_blocks.1.resnets.0.conv1.weight"].shape[0],
            ),
            "attention": tuple(f"unet.down_blocks.{i}.attentions.0.norm.weight" in state for i in range(2)),
        }
    except (KeyError, IndexError) as error:
        raise ValueError(f"not a published IDM checkpoint: {error} is missing") from error


def load_published(model: IDM, state: dict[str, Tensor]) -> None:
    """Copy a published state dict into `model`; ValueError names what is missing, left over or of another shape."""
    names = published_names(model)
    known = {alias for aliases in names.values() for alias in aliases}
    problems = [f"{key} is left over" for key in sorted(set(state) - known)]
    own = dict(model.named_parameters())
    for name, (first, *_) in names.items():
        if first not in state:
            problems.append(f"{first} is missing")
        elif state[first].shape != own[name].shape:
            problems.append(f"{first} is {tuple(state[first].shape)}, expected {tuple(own[name].shape)}")
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the checkpoint does not fit: {'; '.join(problems[:3])}{more}")
    with torch.no_grad():
        for name, (first, *_) in names.items():
            own[name].copy_(state[first])


def save_published(model: IDM, path: str) -> None:
    """Write `model` as the published code's state dict, aliases included; the file appears whole or not at all."""
    own = dict(model.named_parameters())
    state: dict[str, Tensor] = {}
    for name, aliases in published_names(model).items():
        tensor = own[name].detach().cpu()
        state |= {alias: tensor for alias in aliases}
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".save_published-")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_stable_diffusion(path_or_id: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict of the U-Net of a Stable Diffusion 1.x model, and the constructor arguments of an IDM that fits it."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(path_or_id, subfolder="unet", use_safetensors=True)
    config = unet.config
    expected = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "use_linear_projection": False}
    wrong = [f"{key}={config[key]!r} (expected {value!r})" for key, value in expected.items() if config[key] != value]
    blocks = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    if (tuple(config["down_block_types"][:2]), tuple(config["up_block_types"][2:])) != blocks:
        wrong.append(f"blocks {config['down_block_types']}, {config['up_block_types']}")
    if not isinstance(config["attention_head_dim"], int):
        wrong.append(f"attention_head_dim={config['attention_head_dim']!r} (expected one integer)")
    if wrong:
        raise ValueError(f"{path_or_id}: not a Stable Diffusion 1.x U-Net: {', '.join(wrong)}")
    options = {
        "widths": tuple(config["block_out_channels"][:2]),
        "heads": config["attention_head_dim"],  # diffusers 1.x configs give the number of heads under this name
        "norm_groups": config["norm_num_groups"],
    }
    return unet.state_dict(), options


def load_stable_diffusion(model: IDM, state: dict[str, Tensor]) -> None:
    """Copy what IDM has in common with the U-Net of SD 1.x; ValueError names a parameter that is not there or does not fit."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, (first, *_) in published_names(model).items():
            if not first.startswith("unet.") or re.search(r"injectors|rev_module|scale_factor", first):
                continue
            key = re.sub(r"^up_blocks\.(\d+)", lambda m: f"up_blocks.{int(m[1]) + _SD_UP_BLOCK_SHIFT}", first[5:])
            if key not in state or state[key].shape != own[name].shape:
                found = tuple(state[key].shape) if key in state else "nothing"
                raise ValueError(f"the U-Net has {found} for {key}, expected {tuple(own[name].shape)}")
            own[name].copy_(state[key])
