"""What a residual block is: found among the members of a stack, and taken apart into its branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves


class ResidualBranch(nn.Module):
    """f of a block x → x + f(x) that adds its input itself: block(x) − x, shape and side inputs as the block's.

    Raises:
        ValueError: the block returned something else than a tensor of x's shape.
        RuntimeError: the block changed x in place.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name, version = type(self.block).__name__, _version(x)
        y = self.block(x, *args, **kwargs)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{name} turned {tuple(x.shape)} into {found}; a reversible block returns one tensor of its input's shape: "
                "leave it out with blocks=, a class or a predicate, or pass an example so that its shape is looked at"
            )
        if _version(x) != version:
            raise RuntimeError(f"{name} changed its input in place, which is still needed; write x = x + f(x), not x += f(x)")
        return y - x


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # tensors of the inference mode count none


class AttentionBranch(nn.Module):
    """First half of a pre-norm `nn.TransformerEncoderLayer`: dropout1(self_attn(norm1(x)))."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        h = self.layer.norm1(x)
        masks = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        h, _ = self.layer.self_attn(h, h, h, need_weights=False, **masks)
        return self.layer.dropout1(h)


class FeedForwardBranch(nn.Module):
    """Second half of a pre-norm `nn.TransformerEncoderLayer`: the feed-forward of norm2(x). Ignores the masks."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *masks: Any, **named_masks: Any) -> Tensor:
        layer = self.layer
        return layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.linear1(layer.norm2(x))))))


class ScaledBranch(nn.Module):
    """scale · f."""

    def __init__(self, branch: nn.Module, scale: float) -> None:
        super().__init__()
        self.branch, self.scale = branch, scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.scale * self.branch(x, *args, **kwargs)


def residual_branches(block: nn.Module) -> Sequence[nn.Module]:
    """The two halves of a pre-norm `nn.TransformerEncoderLayer`, and of any other block one `ResidualBranch`."""
    if type(block) is nn.TransformerEncoderLayer and block.norm_first:  # a subclass may do something else
        return AttentionBranch(block), FeedForwardBranch(block)
    return (ResidualBranch(block),)


def is_pre_norm_layer(block: nn.Module) -> bool:
    return isinstance(block, nn.TransformerEncoderLayer) and block.norm_first


def members_of(stack: nn.Module) -> list[nn.Module]:
    """In order; unlike `children()`, a shared module as often as it stands there."""
    return [member for member in stack._modules.values() if member is not None]


@dataclass(frozen=True)
class MemberCall:
    """One call of a stack's member in the example's forward pass."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def keeps_shape(self) -> bool:
        given = self.args[0] if self.args else None
        return isinstance(given, Tensor) and isinstance(self.output, Tensor) and given.shape == self.output.shape

    def is_residual(self) -> bool:
        """With all parameters at zero, x + f(x) is x."""
        zeros = {name: torch.zeros_like(p) for name, p in self.block.named_parameters()}
        y = functional_call(self.block, zeros, self.args, self.kwargs)
        return bool(zeros) and y.dtype == self.args[0].dtype and torch.equal(y, self.args[0])

    def follows(self, before: MemberCall) -> bool:
        """It read what `before` returned, and the same side inputs."""
        mine, others = (tree_leaves((call.args[1:], call.kwargs)) for call in (self, before))
        if self.args[0] is not before.output or len(mine) != len(others):
            return False
        return all(
            a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b for a, b in zip(mine, others, strict=True)
        )


@contextmanager
def calls_of(
    model: nn.Module, stacks: Sequence[nn.Module], example: Tensor | tuple[Any, ...] | None
) -> Iterator[list[MemberCall] | None]:
    """The calls of all stacks' members on `example`, in order; None without one. Inside, the model is in eval mode."""
    if example is None:
        yield None
        return
    calls: list[MemberCall] = []

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(MemberCall(block, args, kwargs, output))

    members = {member for stack in stacks for member in members_of(stack)}
    hooks = [member.register_forward_hook(record, with_kwargs=True) for member in members]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(*(example if isinstance(example, tuple) else (example,)))
            for hook in hooks:
                hook.remove()
            yield calls
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode


def block_spans(
    members: Sequence[nn.Module], chosen: Callable[[nn.Module], bool] | None, calls: Sequence[MemberCall] | None
) -> list[range]:
    """Positions of each two or more consecutive blocks among the members of one stack.

    Args:
        chosen: which members are blocks; None: those that are residual in `calls`.
        calls: see `calls_of`; with them, a block must keep its shape and read what the block before it returned.
    """
    here = set(members)
    own = [call for call in calls or () if call.block in here][: len(members)]
    if calls is not None and [call.block for call in own] != list(members):
        return []  # not looped over from its first to its last
    spans: list[range] = []
    for i, member in enumerate(members):
        if own and not own[i].keeps_shape() or not (own[i].is_residual() if chosen is None else chosen(member)):
            continue
        if spans and spans[-1].stop == i and (not own or own[i].follows(own[i - 1])):
            spans[-1] = range(spans[-1].start, i + 1)
        else:
            spans.append(range(i, i + 1))
    return [span for span in spans if len(span) > 1]
