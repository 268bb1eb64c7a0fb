"""IDM as a module: its interface, its weights' formats, and what it refuses."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from idm_fast import IDM, BlockCompressedSensing
from idm_fast.memory.count import count_step
from idm_fast.models.convert import published_names

SMALL = {"widths": (16, 32), "heads": 2, "norm_groups": 4, "attention": (True, True)}


def small(steps: int = 2, **options: object) -> IDM:
    torch.manual_seed(0)
    return IDM(steps=steps, **(SMALL | options))


def disturbed(model: IDM) -> IDM:
    """Every parameter moved, so that scales at 0 and 1 hide nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


class Inpainting:
    """An operator of a user's own, with nothing but deepinv's names."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def A(self, x: Tensor) -> Tensor:
        return x * self.mask

    def A_adjoint(self, y: Tensor) -> Tensor:
        return y * self.mask


def test_network_with_zero_noise_estimate_returns_the_adjoint() -> None:
    model = small()
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    torch.nn.init.zeros_(model.unet.conv_out.bias)
    with torch.no_grad():
        for v in model.v:
            v.fill_(0.0)  # each step replaces the stream, so that the sampler alone is left
    model.eval()
    physics = BlockCompressedSensing((32, 32), 0.25)
    y = physics.A(torch.rand(2, 1, 32, 32))
    torch.testing.assert_close(model(y, physics), physics.A_adjoint(y))


def test_output_fits_the_measurements_where_steps_are_not_blended() -> None:
    model = small()
    with torch.no_grad():
        for v in model.v:
            v.fill_(0.0)
    physics = BlockCompressedSensing((32, 32), 0.25)
    y = physics.A(torch.rand(2, 1, 32, 32))
    torch.testing.assert_close(physics.A(model.eval()(y, physics)), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [None, ()])
@pytest.mark.parametrize("attention", [(True, True), (False, False)])
def test_two_level_gives_the_gradients_of_store(keep: tuple[str, ...] | None, attention: tuple[bool, bool]) -> None:
    model = disturbed(small(attention=attention).double())
    physics = BlockCompressedSensing((32, 64), 0.25).double()
    x = torch.rand(2, 1, 32, 64, dtype=torch.float64)
    gradients = {}
    for schedule in ("store", "two_level"):
        model.schedule, model.keep = schedule, keep
        y = physics.A(x).requires_grad_()
        loss = (model(y, physics) - x).abs().mean()
        gradients[schedule] = torch.autograd.grad(loss, [y, *model.parameters()])
    assert all(parameter.grad is None for parameter in model.parameters())
    total = torch.cat([g.flatten() for g in gradients["store"]]).norm().item()
    for stored, recovered in zip(gradients["store"], gradients["two_level"], strict=True):
        # Some gradients are zero by symmetry (a bias before a norm); they stay below the rounding of all of them together.
        assert (recovered - stored).norm() <= 1e-9 * stored.norm() + 1e-14 * total


@pytest.mark.parametrize("schedule", ["store", "flat", "two_level"])
def test_channels_last_weights_give_the_same_gradients_without_copies_of_the_layout(schedule: str) -> None:
    model = disturbed(small(schedule=schedule, attention=(True, True)).double())
    physics = BlockCompressedSensing((32, 32), 0.25).double()
    x = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    gradients, copies = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=memory_format).zero_grad()
        step = count_step(lambda: (model(physics.A(x), physics) - x).abs().mean(), model.parameters())
        gradients.append([parameter.grad for parameter in model.parameters()])
        copies.append(step.calls.get("aten.clone", 0))
    total = torch.cat([g.flatten() for g in gradients[0]]).norm().item()
    for contiguous, channels_last in zip(*gradients, strict=True):
        assert (channels_last - contiguous).norm() <= 1e-9 * contiguous.norm() + 1e-14 * total
    assert copies[1] < copies[0], "attention reads rows of pixels, which lie so already"


ASKING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}
"""What makes the host wait for a GPU: values, or sizes that depend on them."""


@pytest.mark.parametrize("schedule", ["store", "flat", "two_level"])
def test_a_step_asks_for_no_value_but_those_it_checks(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, physics = small(schedule=schedule), BlockCompressedSensing((32, 32), 0.25)
    monkeypatch.setattr(IDM, "check_parameters", lambda self: None)
    with torch.autograd.profiler.profile() as profile:  # under a dispatch mode some gradients go another way
        model(physics.A(torch.rand(2, 1, 32, 32)), physics).abs().mean().backward()
    called = {event.key for event in profile.key_averages()}
    assert "aten::mul" in called and not called & ASKING


def test_two_level_with_double_streams_under_autocast_is_exact_to_the_rounding_of_the_bodies() -> None:
    """Inverting in float64 recovers what the bodies saw, so bfloat16 bodies round the same way twice."""
    model = disturbed(small(stream_dtype="float64"))
    physics = BlockCompressedSensing((32, 32), 0.25)
    x = torch.rand(2, 1, 32, 32)
    gradients = {}
    for schedule in ("store", "two_level"):
        model.schedule = schedule
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(physics.A(x), physics) - x).abs().mean()
        gradients[schedule] = torch.autograd.grad(loss, list(model.parameters()))
    total = torch.cat([g.flatten() for g in gradients["store"]]).norm()
    error = torch.cat([(a - b).flatten() for a, b in zip(*gradients.values(), strict=True)]).norm()
    assert error / total < 2**-9


@pytest.mark.parametrize("schedule", ["store", "two_level"])
def test_any_operator_with_deepinvs_names_serves(schedule: str) -> None:
    model = small(schedule=schedule)
    physics = Inpainting((torch.rand(1, 1, 20, 28) > 0.5).float())
    x = torch.rand(2, 1, 20, 28)
    out = model(physics.A(x), physics)
    out.square().mean().backward()
    assert out.shape == x.shape
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_operator_of_ones_own_and_the_fused_one_agree() -> None:
    class Plain:
        def __init__(self, fused: BlockCompressedSensing) -> None:
            self.A, self.A_adjoint = fused.A, fused.A_adjoint

    model = disturbed(small()).double().eval()
    fused = BlockCompressedSensing((32, 32), 0.25).double()
    y = fused.A(torch.rand(1, 1, 32, 32, dtype=torch.float64))
    torch.testing.assert_close(model(y, Plain(fused)), model(y, fused))


def test_saved_and_loaded_network_is_the_same(tmp_path: Path) -> None:
    model = disturbed(small(trained_ratios=[0.1], keep=[])).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    again = IDM.from_pretrained(tmp_path)
    assert again.config["trained_ratios"] == [0.1]
    assert (again.schedule, again.keep) == ("two_level", frozenset())
    physics = BlockCompressedSensing((32, 32), 0.1)
    y = physics.A(torch.rand(1, 1, 32, 32))
    assert torch.equal(again.eval()(y, physics), model(y, physics))


def test_tiny_fits_a_package(tmp_path: Path) -> None:
    IDM.tiny().save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size <= 8e6


@pytest.mark.parametrize("attention", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_published_format_travels_both_ways_for_any_number_of_steps(
    steps: int, attention: tuple[bool, bool], tmp_path: Path
) -> None:
    model = disturbed(small(steps, attention=attention))
    path = str(tmp_path / "net_params_50.pkl")
    model.save_published(path)
    again = IDM.from_published(path, heads=2, norm_groups=4)
    assert again.config["steps"] == steps
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_pickle_that_holds_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    for name, write in (("torch.pkl", torch.save), ("plain.pkl", lambda o, f: Path(f).write_bytes(pickle.dumps(o)))):
        write({"alpha": Bomb()}, tmp_path / name)
        with pytest.raises(ValueError, match="can be read safely"):
            IDM.from_published(str(tmp_path / name))
    assert not (tmp_path / "executed").exists()


def test_checkpoint_that_does_not_fit_names_what_is_wrong(tmp_path: Path) -> None:
    path = str(tmp_path / "net.pkl")
    small().save_published(path)
    state = torch.load(path, weights_only=True)
    state.pop("unet.conv_out.bias")
    state["extra"] = torch.zeros(1)
    torch.save(state, path)
    with pytest.raises(ValueError, match="extra is left over; unet.conv_out.bias is missing"):
        IDM.from_published(path, heads=2, norm_groups=4)
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a published IDM checkpoint: 'alpha' is missing"):
        IDM.from_published(path)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as Stable Diffusion 1.5's, with the same U-Net at small widths. Only `unet/` exists."""
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32, 64, 64), attention_head_dim=2, norm_num_groups=4, cross_attention_dim=8,
        sample_size=8,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    return folder


def test_stable_diffusion_weights_land_where_they_belong(stable_diffusion: Path) -> None:
    model = IDM.from_stable_diffusion(str(stable_diffusion), steps=2)
    unet = UNet2DConditionModel.from_pretrained(stable_diffusion / "unet")
    assert tuple(model.config["widths"]) == (16, 32)
    up = model.unet.up_blocks[1]
    pairs = [
        (model.unet.conv_in.weight, unet.conv_in.weight),
        (model.unet.down_blocks[1].first_resnet.conv1.weight, unet.down_blocks[1].resnets[0].conv1.weight),
        (model.unet.down_blocks[0].downsampler.bias, unet.down_blocks[0].downsamplers[0].conv.bias),
        (up.chain.chain.bodies[3].conv_shortcut.weight, unet.up_blocks[3].resnets[1].conv_shortcut.weight),
        (
            up.chain.chain.bodies[1].transformer_blocks[0].attn1.to_q.weight,
            unet.up_blocks[3].attentions[0].transformer_blocks[0].attn1.to_q.weight,
        ),
        (model.unet.conv_norm_out.weight, unet.conv_norm_out.weight),
    ]
    for own, theirs in pairs:
        assert torch.equal(own, theirs)
    assert model.alpha.tolist() == [0.5, 0.5]


def test_blocks_compute_what_diffusers_blocks_compute(stable_diffusion: Path) -> None:
    """Same weights, same resnet and same attention as diffusers' own modules, with the time embedding and text taken out."""
    model = IDM.from_stable_diffusion(str(stable_diffusion), steps=1)
    unet = UNet2DConditionModel.from_pretrained(stable_diffusion / "unet")
    h = torch.randn(2, 16, 8, 8)
    resnet = unet.down_blocks[0].resnets[0]
    resnet.time_emb_proj = None
    chain = model.unet.down_blocks[0].chain
    torch.testing.assert_close(chain.bodies[0](h), resnet(h, None))
    attention = unet.down_blocks[0].attentions[0]
    for block in attention.transformer_blocks:
        block.attn2 = block.norm2 = None
    own = chain.bodies[2]
    torch.testing.assert_close(own(h), attention(h, return_dict=False)[0], rtol=1e-4, atol=1e-5)


def test_folder_without_a_unet_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        IDM.from_stable_diffusion(str(tmp_path))


@pytest.mark.parametrize("value", [0.0, 1.0, -0.2, float("nan")])
def test_alpha_outside_0_and_1_is_an_error_in_training(value: float) -> None:
    model = small()
    with torch.no_grad():
        model.alpha[1] = value
    physics = BlockCompressedSensing((32, 32), 0.25)
    with pytest.raises(ValueError, match=r"alpha: .* has left \(0, 1\)"):
        model(physics.A(torch.rand(1, 1, 32, 32)), physics)


@pytest.mark.parametrize("name", ["v.1", "unet.up_blocks.0.chain.chain.v.4", "unet.down_blocks.1.chain.v.0"])
@pytest.mark.parametrize("value", [0.0, 1e-5, float("nan")])
def test_v_at_0_is_an_error_in_training_that_names_it(name: str, value: float) -> None:
    model = small()
    with torch.no_grad():
        model.get_parameter(name).fill_(value)
    physics = BlockCompressedSensing((32, 32), 0.25)
    with pytest.raises(ValueError, match=f"{name}: "):
        model(physics.A(torch.rand(1, 1, 32, 32)), physics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: 0"),
        ({"widths": (18, 32)}, "multiples of 4 and 16"),
        ({"schedule": "magic"}, "schedule: 'magic'"),
        ({"keep": {"nothing"}}, "keep: "),
        ({"stream_dtype": "bfloat16"}, "cannot be inverted"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IDM(**(SMALL | options))


def test_image_size_that_cannot_be_halved_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        small()(torch.zeros(1, 1, 6, 8), Inpainting(torch.ones(1, 1, 6, 8)))


def test_every_parameter_has_one_published_name_and_no_name_comes_twice() -> None:
    names = published_names(small())
    aliases = [alias for aliases in names.values() for alias in aliases]
    assert set(names) == {name for name, _ in small().named_parameters()}
    assert len(aliases) == len(set(aliases))
