"""Gradients of many examples at once, held as the factors that they are products of.

A layer's backward pass has g = ∂loss/∂output and the layer's input for every example n, and that
is all one needs: no gradient of a whole batch is ever made. B is the number of examples, T the
number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 26  # elements of gradients that an accelerator makes at a time


@dataclass
class Sums:
    """Sums over examples of a parameter's squared gradients, and of their fourth powers.

    Attributes:
        squares: Σ_n G_n², of the parameter's shape.
        fourths: Σ_n G_n⁴, or None if nobody asks.
    """

    squares: torch.Tensor
    fourths: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        """Add one example's gradient, which is overwritten."""
        if self.fourths is None:
            self.squares.addcmul_(gradient, gradient)
            return
        squared = gradient.mul_(gradient)
        self.squares.add_(squared)
        self.fourths.addcmul_(squared, squared)

    def add_each(self, gradients: torch.Tensor) -> None:
        """Add the gradients of several examples, shape (B, ...)."""
        squared = gradients.square()
        self.squares.add_(squared.sum(0).view_as(self.squares))
        if self.fourths is not None:
            self.fourths.add_(squared.square_().sum(0).view_as(self.fourths))

    def zero(self) -> None:
        """Forget everything."""
        self.squares.zero_()
        if self.fourths is not None:
            self.fourths.zero_()


@dataclass(frozen=True)
class Outer:
    """A weight matrix: G_n = left_nᵀ right_n.

    Attributes:
        left: Shape (B, T, rows).
        right: Shape (B, T, columns).
    """

    left: torch.Tensor
    right: torch.Tensor

    def absolute(self) -> Outer:
        """The same with the sizes of all numbers."""
        return Outer(self.left.abs(), self.right.abs())

    def write(self, out: torch.Tensor, n: int, *, add: bool) -> None:
        """Write example n's gradient into `out`, or add it."""
        out.addmm_(self.left[n].t(), self.right[n], beta=int(add))

    def add_powers(self, sums: Sums) -> bool:
        """Add all examples at once where that is cheaper than one after the other."""
        if self.left.shape[1] == 1:  # (l rᵀ)² = l² (r²)ᵀ, so the sum over examples is one product
            left, right = self.left[:, 0].square(), self.right[:, 0].square()
            sums.squares.addmm_(left.t(), right)
            if sums.fourths is not None:
                sums.fourths.addmm_(left.square_().t(), right.square_())
            return True
        if self.left.device.type == "cpu":
            return False  # one after the other stays in the cache
        self.add_in_chunks(sums, _CHUNK)
        return True

    def add_in_chunks(self, sums: Sums, most: int) -> None:
        """Add so many examples at a time that their gradients have `most` elements, or one."""
        import torch

        step = max(1, most // sums.squares.numel())
        for i in range(0, len(self.left), step):
            sums.add_each(torch.bmm(self.left[i : i + step].mT, self.right[i : i + step]))


@dataclass(frozen=True)
class Vector:
    """A bias or a norm's weight: G_n = Σ_t parts_nt.

    Attributes:
        parts: Shape (B, T, size).
    """

    parts: torch.Tensor

    def absolute(self) -> Vector:
        """The same with the sizes of all numbers."""
        return Vector(self.parts.abs())

    def write(self, out: torch.Tensor, n: int, *, add: bool) -> None:
        """Write example n's gradient into `out`, or add it."""
        found = self.parts[n].sum(0)
        out.view(-1).add_(found) if add else out.view(-1).copy_(found)

    def add_powers(self, sums: Sums) -> bool:
        """Add all examples at once."""
        sums.add_each(self.parts.sum(1))
        return True


@dataclass(frozen=True)
class Rows:
    """An embedding: row i of G_n is Σ_t parts_nt over the tokens t with ids_nt = i.

    Attributes:
        ids: Shape (B, T).
        parts: Shape (B, T, width).
    """

    ids: torch.Tensor
    parts: torch.Tensor

    def absolute(self) -> Rows:
        """The same with the sizes of all numbers."""
        return Rows(self.ids, self.parts.abs())

    def write(self, out: torch.Tensor, n: int, *, add: bool) -> None:
        """Write example n's gradient into `out`, or add it."""
        if not add:
            out.zero_()
        out.index_add_(0, self.ids[n], self.parts[n])

    def add_powers(self, sums: Sums) -> bool:
        """Add all examples at once; a token that an example has twice is summed, then squared."""
        import torch

        count, width = len(self.ids), self.parts.shape[-1]
        rows = len(sums.squares)
        example = torch.arange(count, device=self.ids.device)[:, None]
        found, place = torch.unique((example * rows + self.ids).view(-1), return_inverse=True)
        gradients = self.parts.new_zeros(len(found), width)
        gradients.index_add_(0, place, self.parts.reshape(-1, width))
        squared = gradients.square_()
        sums.squares.index_add_(0, found % rows, squared)
        if sums.fourths is not None:
            sums.fourths.index_add_(0, found % rows, squared.square_())
        return True


Factors = Outer | Vector | Rows


def add_powers(uses: Sequence[Factors], sums: Sums, scratch: Callable[[int], torch.Tensor]) -> None:
    """Add the powers of every example's gradient, which is the sum over all uses of the parameter.

    Args:
        uses: What each use of the parameter in the forward pass contributes.
        sums: Where to add.
        scratch: Gives a run of that many elements to work in.
    """
    if len(uses) == 1 and uses[0].add_powers(sums):
        return
    shape = sums.squares.shape
    gradient = scratch(math.prod(shape)).view(shape)
    for n in range(_examples(uses[0])):
        for i, use in enumerate(uses):
            use.write(gradient, n, add=i > 0)
        sums.add(gradient)


def _examples(use: Factors) -> int:
    return len(use.ids if isinstance(use, Rows) else _first(use))


def _first(use: Outer | Vector) -> torch.Tensor:
    return use.left if isinstance(use, Outer) else use.parts


# --- what a module's own parameters contribute --------------------------------------------------


@dataclass
class Call:
    """One call of a module in the forward pass.

    Attributes:
        module: The module.
        args: What it was called with, detached from the graph.
        kwargs: The same, for what was given by name.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> torch.Tensor:
        """The first thing it was given."""
        found: torch.Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return found


def kind_of_module(module: Any) -> str:
    """linear, transposed, embedding, norm, or "" for what no rule covers.

    What looks like a norm is only taken for one: whether its output is affine in its weight, as
    `norm_factors` needs it, is for the comparison with autograd to find out. So it is with
    subclasses that compute something else.
    """
    import torch

    weight = getattr(module, "weight", None)
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if not isinstance(weight, torch.Tensor):
        return ""
    if type(module).__name__ == "Conv1D" and weight.dim() == 2:  # transformers' own
        return "transposed"
    return "norm" if weight.dim() == 1 and "norm" in type(module).__name__.lower() else ""


def factors_of(call: Call, name: str, gradient: torch.Tensor, count: int) -> Factors:
    """What one call contributes to the gradient of the module's parameter `name`.

    Args:
        call: The call.
        name: "weight" or "bias".
        gradient: ∂loss/∂output, shape (B, ..., size) or (B·T, size).
        count: B.
    """
    kind = kind_of_module(call.module)
    flat = gradient.reshape(count, -1, gradient.shape[-1])
    if name == "bias":
        return Vector(flat)
    if kind == "embedding":
        return _embedding(call, flat)
    if kind == "norm":
        parts = gradient * norm_factors(call)
        return Vector(parts.reshape(count, -1, gradient.shape[-1]))
    inputs = call.input.reshape(count, -1, call.input.shape[-1])
    return Outer(flat, inputs) if kind == "linear" else Outer(inputs, flat)


def _embedding(call: Call, gradient: torch.Tensor) -> Rows:
    ids = call.input.reshape(len(call.input), -1).expand(len(gradient), -1)
    padding = call.module.padding_idx
    if padding is not None:  # autograd gives that row no gradient
        gradient = gradient.masked_fill((ids == padding)[..., None], 0.0)
    scale = getattr(call.module, "embed_scale", 1.0)  # of transformers' scaled embeddings
    return Rows(ids, gradient if scale == 1.0 else gradient * scale)


def norm_factors(call: Call) -> torch.Tensor:
    """∂output/∂weight of a norm, elementwise: output(weight 1) - output(weight 0).

    That is right for every output affine in the weight, whatever the norm: x/rms(x)·w,
    x/rms(x)·(1 + w), (x - mean)/sd·w + b.
    """
    import torch

    module = call.module
    if type(module) is torch.nn.LayerNorm:
        return torch.nn.functional.layer_norm(call.input, module.normalized_shape, eps=module.eps)
    at = [
        torch.func.functional_call(module, {"weight": value}, call.args, call.kwargs)
        for value in (torch.ones_like(module.weight), torch.zeros_like(module.weight))
    ]
    found: torch.Tensor = at[0] - at[1]
    return found


def fits(module: Any, name: str, call: Call, output: Any, count: int, length: int) -> bool:
    """Whether a call is of the form that `factors_of` reads: rows of input for each example.

    Args:
        module: The module.
        name: The name of its parameter.
        call: How it was called.
        output: What it returned.
        count: B.
        length: T of the model's own inputs.
    """
    import torch

    kind = kind_of_module(module)
    if not kind or name not in ("weight", "bias") or not isinstance(output, torch.Tensor):
        return False
    inputs = call.input if call.args or call.kwargs else None
    if not isinstance(inputs, torch.Tensor) or inputs.dim() < 1 or output.dim() < 2:
        return False
    if kind == "embedding":
        is_lookup = not inputs.is_floating_point() and output.shape[:-1] == inputs.shape
        return is_lookup and len(inputs) in (1, count)
    flat = count * length if inputs.dim() == output.dim() == 2 else count  # (B·T, size)
    if len(inputs) != len(output) or len(output) not in (count, flat):
        return False
    facing = output if name == "bias" or kind in ("norm", "transposed") else inputs
    return bool(getattr(module, name).shape[-1:] == facing.shape[-1:])
