"""`make_reversible` against the two streams written by hand and against plain autograd on the same function."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from idm_fast import make_reversible
from idm_fast.memory.count import count_step
from idm_fast.reversible.convert import ReversibleStack


class Block(nn.Module):
    """Pre-activation residual block on channels, with BatchNorm and dropout."""

    def __init__(self, channels: int = 4, out: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        out = channels if out is None else out
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, out, 3, padding=1),
            nn.Dropout(dropout),
        )
        self.skip = nn.Identity() if out == channels else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.skip(x) + scale * self.branch(x)


class Looped(nn.Module):
    """A model that loops over a list, with a side input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale)
        return self.head(x)


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block(3, 4), *(Block(4, dropout=dropout) for _ in range(3)), nn.Conv2d(4, 4, 1), Block(), Block()]
    return nn.Sequential(*blocks).double()


def encoder(**options: object) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    arguments = dict(d_model=8, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True, norm_first=True) | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that norm_first turns nested tensors off
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(**arguments), 3, norm=nn.LayerNorm(8)).double()


def image(channels: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, channels, 5, 6, dtype=torch.float64, requires_grad=True)


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)


def two_streams(branches: list[Callable[[Tensor], Tensor]], x: Tensor, scale: float = 1) -> Tensor:
    x1, x2 = x, x
    for f in branches:
        x1, x2 = x2 + scale * f(x1), x1
    return (x1 + x2) / 2


def chains(model: nn.Module) -> list:
    return [run.chain for stack in model.modules() if isinstance(stack, ReversibleStack) for run in stack.runs.values()]


def assert_gradients_are_those_of_plain_autograd(model: nn.Module, *inputs: Tensor) -> None:
    found = {}
    for recovery in ("store", "invert"):
        for chain in chains(model):
            chain.recovery = recovery
        torch.manual_seed(7)
        wanted = [*(x for x in inputs if x.requires_grad), *model.parameters()]
        found[recovery] = torch.autograd.grad(model(*inputs).sin().sum(), wanted)
    assert any(gradient.abs().max() > 0 for gradient in found["store"])
    for inverted, stored in zip(found["invert"], found["store"], strict=True):
        torch.testing.assert_close(inverted, stored, rtol=1e-10, atol=1e-10 * float(stored.abs().max()))


def test_sequential_computes_the_two_streams_written_out() -> None:
    plain, x = network(), image()
    model = make_reversible(copy.deepcopy(plain), x)
    first, *run, between, fifth, sixth = plain
    h = between(two_streams([block.branch for block in run], first(x)))
    torch.testing.assert_close(model(x), two_streams([fifth.branch, sixth.branch], h), rtol=1e-12, atol=1e-12)


def test_scale_two_computes_the_whole_sum_of_the_branches() -> None:
    blocks, x = [Block().double().eval() for _ in range(3)], image(4)
    model = make_reversible(nn.Sequential(*blocks).eval(), blocks=Block, scale=2)
    torch.testing.assert_close(model(x), two_streams([block.branch for block in blocks], x, scale=2), rtol=1e-12, atol=1e-12)
    constant = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        for block in blocks:  # branches that ignore what they read: the sum is the plain network's
            block.branch = nn.Conv2d(4, 4, 1).double()
            block.branch.weight.zero_()
    torch.testing.assert_close(model(x + constant), nn.Sequential(*blocks)(x + constant), rtol=1e-12, atol=1e-12)
    assert_gradients_are_those_of_plain_autograd(model, x)


def test_encoder_computes_attention_and_feed_forward_on_two_streams() -> None:
    plain, x = encoder(), tokens()
    halves = [half for b in plain.layers for half in ((b.norm1, b._sa_block), (b.norm2, b._ff_block))]
    masks = {"_sa_block": (None, None)}
    branches = [lambda h, norm=norm, f=f: f(norm(h), *masks.get(f.__name__, ())) for norm, f in halves]
    expected = plain.norm(two_streams(branches, x))
    model = make_reversible(plain)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert len(chains(model)[0].bodies) == 6


def test_converts_in_place_and_finds_the_same_blocks_by_example_class_and_predicate() -> None:
    for arguments in ({"example": image()}, {"blocks": lambda m: isinstance(m, Block) and isinstance(m.skip, nn.Identity)}):
        model = network()
        assert make_reversible(model, **arguments) is model
        assert list(model.runs) == [range(1, 4), range(5, 7)]
    model = make_reversible(network(), image(), blocks=Block)
    assert list(model.runs) == [range(1, 4), range(5, 7)]  # the first block changes the number of channels
    assert "blocks 1 to 3 reversible: 3 branches, recovery=invert" in repr(model)


def test_gradients_of_a_network_with_batch_norm_and_dropout_are_those_of_plain_autograd() -> None:
    x = image()
    assert_gradients_are_those_of_plain_autograd(make_reversible(network(dropout=0.3), x), x)


def test_gradients_of_an_encoder_with_masks_and_dropout_are_those_of_plain_autograd() -> None:
    model, x = make_reversible(encoder(dropout=0.3)), tokens()
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    wrapped = _Masked(model, causal, padding)
    assert_gradients_are_those_of_plain_autograd(wrapped, x)
    assert not torch.allclose(wrapped(x), model(x))


class _Masked(nn.Module):
    def __init__(self, encoder: nn.Module, mask: Tensor, padding: Tensor) -> None:
        super().__init__()
        self.encoder, self.masks = encoder, (mask, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, *self.masks)


def test_gradients_of_side_inputs_in_a_looped_list() -> None:
    model, x, scale = Looped().double(), image(4), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    make_reversible(model, (x, scale))
    assert list(model.blocks.runs) == [range(3)] and len(model.blocks) == len(list(model.blocks)) == 3
    expected = model.head(two_streams([lambda h, b=b: 0.7 * model.blocks[b].branch(h) for b in range(3)], x))
    torch.testing.assert_close(model(x, scale), expected, rtol=1e-12, atol=1e-12)
    assert_gradients_are_those_of_plain_autograd(model, x, scale)


def test_gradients_of_one_block_in_several_places() -> None:
    block = Block()
    model = make_reversible(nn.Sequential(block, Block(), block, block).double(), blocks=Block)
    assert list(model.runs) == [range(4)]
    assert_gradients_are_those_of_plain_autograd(model, image(4))


def test_batch_norm_statistics_move_once_a_step_and_not_by_the_example() -> None:
    plain, x = network(), image()
    model = make_reversible(plain, x)
    assert model.training and all(m.training for m in model.modules())
    assert int(model[2].branch[0].num_batches_tracked) == 0
    model(x).sum().backward()
    assert int(model[2].branch[0].num_batches_tracked) == 1


def test_state_dict_keeps_its_names_both_ways() -> None:
    for plain, model in ((network(), make_reversible(network(), image())), (encoder(), make_reversible(encoder()))):
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        model.load_state_dict(plain.state_dict())
        plain.load_state_dict(model.state_dict())
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_indices_give_the_plain_blocks_and_a_slice_a_plain_stack() -> None:
    plain, x = network(), image(4)
    model = make_reversible(copy.deepcopy(plain), image())
    torch.testing.assert_close(model[1](x), plain[1](x))
    torch.testing.assert_close(model[1:3](x), plain[2](plain[1](x)))


def test_copies_and_pickles_run_on_their_own_weights() -> None:
    model, x = make_reversible(network(), image()), image()
    expected = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        torch.testing.assert_close(again(x), expected)
        model.load_state_dict(again.state_dict())
        assert_gradients_are_those_of_plain_autograd(again, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_model_is_kept(dtype: torch.dtype) -> None:
    model, x = make_reversible(encoder()).to(dtype), tokens().to(dtype).detach()
    y = model(x)
    y.sum().backward()
    assert y.dtype == dtype and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_eight_times_the_blocks_take_the_same_memory_but_not_when_stored() -> None:
    def peak(depth: int, recovery: str) -> int:
        model = make_reversible(nn.Sequential(*(Block() for _ in range(depth))), blocks=Block, recovery=recovery)
        x = torch.randn(2, 4, 16, 16)
        return count_step(lambda: model(x).sum(), model.parameters(), [x, *model.buffers()]).peak_bytes

    assert peak(32, "invert") <= 1.02 * peak(4, "invert")
    assert peak(32, "store") >= 6 * peak(4, "store")


def test_float32_streams_through_64_layers_recover_the_input_to_the_sum_of_their_roundings() -> None:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(64)]
    (chain,) = chains(make_reversible(nn.Sequential(*layers)))
    x = tokens().detach().float().repeat(1, 1, 2)
    with torch.no_grad():
        y1, y2 = chain(x, x)
        z1, z2 = chain.inverse(y1, y2)
    # Each of 128 branches rounds once forward and once back, at the size of the largest stream.
    bound = 2 * 128 * torch.finfo(torch.float32).eps * float(y1.abs().max())
    assert max((z1 - x).abs().max(), (z2 - x).abs().max()) <= bound
    assert bound <= 1e-3


def test_outermost_blocks_are_taken_and_their_insides_left_alone() -> None:
    class Group(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Block(), Block())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.inner(x)

    model = make_reversible(nn.Sequential(Group(), Group()).double(), blocks=(Group, Block))
    assert list(model.runs) == [range(2)] and type(model[0].inner) is nn.Sequential
    assert_gradients_are_those_of_plain_autograd(model, image(4))


def test_blocks_that_do_not_follow_each_other_in_the_example_are_no_run() -> None:
    class Scaled(Looped):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            for block in self.blocks:
                x = 2 * block(x, scale)
            return x

    class Different(Looped):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                x = block(x, scale + i)
            return x

    class Indexed(Looped):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.blocks[2](self.blocks[1](x, scale), scale)

    for kind in (Scaled, Different, Indexed):
        with pytest.raises(ValueError, match="no two consecutive residual blocks"):
            make_reversible(kind().double(), (image(4), torch.ones(1, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 5)),
            {"example": torch.ones(2, 5)},
            "when their",
        ),
        (nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), {}, r"hold \['Linear'\]; looked for nn.TransformerEncoderLayer"),
        (nn.Sequential(Block(), nn.ReLU(), Block()), {"blocks": Block}, "looked for blocks=.*Block"),
        (nn.Linear(5, 5), {}, "in the 0 nn.Sequential and nn.ModuleList of Linear, which hold nothing"),
        (encoder(norm_first=False), {"example": tokens()}, "no two consecutive residual blocks"),
    ],
)
def test_nothing_to_convert_says_what_was_looked_for(model: nn.Module, arguments: dict, message: str) -> None:
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        make_reversible(model, **arguments)
    assert [type(module) for module in model.modules()] == before


def test_block_that_changes_the_shape_is_named_at_first_use() -> None:
    model = make_reversible(nn.Sequential(Block(4, 8), Block(8)), blocks=Block)
    with pytest.raises(ValueError, match=r"Block turned \(2, 4, 5, 6\) into \(2, 8, 5, 6\)"):
        model(image(4).float())


def test_block_that_adds_in_place_is_named() -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            x += self.branch(x.clone())
            return x

    model = make_reversible(nn.Sequential(InPlace(), InPlace()), blocks=InPlace)
    with torch.no_grad(), pytest.raises(RuntimeError, match="InPlace changed its input in place"):
        model(image(4).detach().float())


def test_block_that_is_replaced_afterwards_is_refused() -> None:
    model = make_reversible(network(), image())
    model[2] = Block().double()
    with pytest.raises(RuntimeError, match="after make_reversible"):
        model(image())


def test_unknown_option_leaves_the_model_alone() -> None:
    model = network()
    with pytest.raises(ValueError, match="cannot be inverted"):
        make_reversible(model, image(), stream_dtype=torch.bfloat16)
    assert type(model) is nn.Sequential


def test_converted_model_runs_in_inference_mode() -> None:
    torch.manual_seed(0)
    model, x = make_reversible(nn.Sequential(Block(), Block()), torch.randn(2, 4, 6, 6)).eval(), torch.randn(2, 4, 6, 6)
    expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x.clone()), expected)
