"""The layer interface: a linear layer whose weight is a product (and sum) of trained parts.

A factored layer replaces an `nn.Linear`. `effective_weight` returns the equivalent dense matrix, so
that any layer can be merged into a plain one, compared or exported. The optimizer schedules events
(merges, switches, resampling); a layer only implements them.

Besides the tensors, a state dict holds the options that determine the layer's function but not its
shapes (`SETTINGS`), so that loading with a different value is an error.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lowrank.cuda.noise import mix, stochastic_bfloat16

from ..engine.chunks import row_chunks, wide_dtype

_EXTRA = "_extra_state"
#: Attribute of parameters that are factors, by which an optimizer knows them without their layer.
FACTOR = "_lowrank_factor"


class FactoredLinear(nn.Module):
    """y = x W^T + b with a weight W (m x n) made of parts.

    Attributes:
        in_features: n.
        out_features: m.
        rank: r of the trained factors, at most min(m, n).
        bias: (m,) or None, trained as in `nn.Linear`.
    """

    #: Trained parts, by the names of their parameters.
    FACTORS: ClassVar[tuple[str, ...]]
    #: Frozen matrices, by the names of their parameters: FSDP2 shards those, and no buffers.
    FROZEN: ClassVar[tuple[str, ...]] = ()
    #: Attributes with numbers that determine the function; new ones come last.
    SETTINGS: ClassVar[tuple[str, ...]] = ()
    #: Whether a backward pass leaves the optimizer more than gradients of parameters.
    LEAVES_MORE: ClassVar[bool] = False

    in_features: int
    out_features: int
    rank: int
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rank = min(rank, linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.train(linear.training)

    @classmethod
    @abstractmethod
    def of(cls, linear: nn.Linear, seed: int, **options: Any) -> Self:
        """Makes a layer that replaces `linear`.

        Args:
            linear: the layer, whose bias is shared and whose weight is read.
            seed: of everything random about this layer.
            **options: the method's own.
        """

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """W as a new m x n tensor without gradient, in fp32 (fp64 for fp64)."""

    def host_tensors(self) -> tuple[str, ...]:
        """Names of tensors that stay on the CPU when the layer is moved.

        They are saved and loaded like buffers but are not registered, so that nothing broadcasts
        them.
        """
        return ()

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the parts."""
        part: Tensor = getattr(self, self.FACTORS[0])
        return part.dtype

    @property
    def weight(self) -> Tensor:
        """W as a new m x n tensor in the parts' precision, for modules that read `layer.weight`.

        Gradients flow to the factors. If the layer's backward pass differs from that of a dense W,
        the backward pass raises `RuntimeError` instead.
        """
        factors = [getattr(self, name) for name in self.FACTORS]
        if not (torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)):
            return self.effective_weight().to(self.dtype)
        dense = self.differentiable_weight()
        if dense is None:
            dense = _RefusesGradients.apply(  # type: ignore[no-untyped-call]
                self.effective_weight().to(self.dtype), type(self).__name__, *factors
            )
        return dense

    def differentiable_weight(self) -> Tensor | None:
        """W, differentiable by autograd; None if the layer defines other gradients."""
        return None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the same function; the bias is shared."""
        weight = self.effective_weight().to(self.dtype)
        m, n = self.out_features, self.in_features
        linear = nn.Linear(n, m, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    # Saving and loading

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves or casts the layer; host tensors are cast only."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        part = getattr(self, self.FACTORS[0])
        for name in self.host_tensors():
            tensor: Tensor = getattr(self, name)
            dtype = part.dtype if tensor.is_floating_point() else tensor.dtype
            if tensor.is_meta or (part.is_meta and tensor.is_floating_point()):
                place = "meta" if part.is_meta else "cpu"
                setattr(self, name, torch.empty_like(tensor, dtype=dtype, device=place))
            else:
                setattr(self, name, tensor.to(dtype=dtype, device="cpu"))
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.host_tensors():
            destination[prefix + name] = getattr(self, name)
        if self.SETTINGS:
            values = [float(getattr(self, name)) for name in self.SETTINGS]
            # A tensor, which every file format can store, under torch's key for extra state.
            destination[prefix + _EXTRA] = torch.tensor(values, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        others = self._other_settings(state_dict.pop(prefix + _EXTRA, None))
        if others:
            error_msgs.append(f"{prefix[:-1]}: {others}")
            state_dict.update(self.state_dict(prefix=prefix))  # for the submodules
            return
        # `save_pretrained` adds a dense weight to the parts.
        dense = state_dict.pop(prefix + "weight", None)
        if dense is not None and not any(prefix + name in state_dict for name in self.FACTORS):
            error_msgs.append(
                f"{prefix[:-1]} is dense in this state dict, and here a {type(self).__name__}: "
                "accepted is load_state_dict first, then convert(name, model) or build"
            )
            state_dict.update(self.state_dict(prefix=prefix))
            return
        for name in self.host_tensors():
            self._load_host(
                name, prefix, state_dict, local_metadata, strict, missing_keys, error_msgs
            )
        super()._load_from_state_dict(
            *(state_dict, prefix, local_metadata, strict),
            *(missing_keys, unexpected_keys, error_msgs),
        )

    def _other_settings(self, saved: Tensor | None) -> str:
        """The error text for saved settings that differ from the layer's, or an empty string."""
        values = [] if saved is None else saved.tolist()
        return ", ".join(
            f"saved with {name}={value:g}, and this layer has {name}={getattr(self, name):g}: "
            f"accepted is a model converted with {name}={value:g}"
            for name, value in zip(self.SETTINGS, values, strict=False)
            if value != getattr(self, name)
        )

    @torch.no_grad()
    def _load_host(
        self,
        name: str,
        prefix: str,
        state_dict: dict[str, Any],
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, own = prefix + name, getattr(self, name)
        value = state_dict.pop(key, None)
        if value is None:
            if strict:
                missing_keys.append(key)
        elif value.shape != own.shape:
            error_msgs.append(
                f"{key} is saved with shape {tuple(value.shape)}: accepted is {tuple(own.shape)}"
            )
        elif local_metadata.get("assign_to_params_buffers", False):
            setattr(self, name, value.detach().cpu())
        else:
            own.copy_(value)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


class _RefusesGradients(torch.autograd.Function):
    """The identity, whose backward pass raises: a dense weight that can't train the layer."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kind: str, *factors: Tensor) -> Tensor:
        ctx.kind = kind
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            f"a module reads the weight of a {ctx.kind} and computes with it, which can't train its"
            " factors as the method does: accepted are patterns that leave this layer out"
        )


def constant(frozen: Tensor) -> Tensor:
    """A tensor that gets no gradient, for a forward pass.

    The parameter itself if it is frozen: ZeRO's stage 3 frees what a module's own parameters have
    gathered until the backward pass, and couldn't what a detached tensor shares.
    """
    return frozen.detach() if frozen.requires_grad else frozen


def uniform(shape: tuple[int, ...], bound: float, like: Tensor, *seed: int) -> Tensor:
    """Samples U(-bound, bound), equal on every device and process for equal seeds.

    Args:
        shape: of the result.
        bound: largest magnitude.
        like: tensor of the result's dtype and device.
        *seed: integers that are combined into one seed.
    """
    if like.device.type == "meta":
        return torch.empty(shape, dtype=like.dtype, device="meta")
    generator = torch.Generator().manual_seed(mix(*seed))
    drawn = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    return drawn.to(device=like.device, dtype=like.dtype)


def kaiming_bound(fan_in: int) -> float:
    """The bound of `kaiming_uniform_(a=sqrt(5))`: 1 / sqrt(fan_in)."""
    return 1.0 / math.sqrt(fan_in)


@torch.no_grad()
def add_product(
    weight_mn: Tensor,
    left_mk: Tensor,
    right_kn: Tensor,
    scale: float,
    seed: int,
    first_row: int = 0,
) -> None:
    """In place: weight <- weight + scale * left right, summed in fp32 (fp64) in chunks of rows.

    A bf16 weight is rounded stochastically: rounding to nearest would lose small products.

    Args:
        weight_mn: m x n.
        left_mk: m x k.
        right_kn: k x n.
        scale: factor on the product.
        seed: of the rounding.
        first_row: the first of these m rows in the whole weight, so that all processes that share
            one round as a single process does.
    """
    wide, n = wide_dtype(weight_mn), weight_mn.shape[1]
    right_kn = right_kn.to(wide)
    for span in row_chunks(weight_mn):
        part = weight_mn[span]
        total = part.to(wide).addmm(left_mk[span].to(wide), right_kn, alpha=scale)
        if part.dtype == torch.bfloat16:
            total = stochastic_bfloat16(total, seed, (first_row + span.start) * n)
        part.copy_(total)
