"""A learning rate of its own for a model's output head."""

from __future__ import annotations

from torch import Tensor, nn

from .engine.options import Group, check_lr
from .param_groups import _tied
from .roles import head_of


def with_head_rate(model: nn.Module, groups: list[Group], rate: float | Tensor) -> list[Group]:
    """Groups in which the head's weight has a group of its own, after the one that it was in.

    Args:
        model: the model; its head is `model.get_output_embeddings()`, or where a model has no such
            method its last linear layer.
        groups: of all parameters that are trained.
        rate: the head's learning rate.

    Raises:
        ValueError: the rate is no number of at least 0, the model has no head that is trained, or
            the head's weight is an embedding's too.
    """
    check_lr(rate, "head_lr")
    head = head_of(model)
    owners = [group for group in groups if any(param is head for param in group["params"])]
    if head is None or not owners:
        raise ValueError(f"head_lr={rate}: the model has no output head that is trained")
    if head in _tied(model):
        raise ValueError(
            f"head_lr={rate}: the head's weight is an embedding's too; accepted is plain_lr"
        )
    (owner,) = owners
    names = owner.get("param_names")
    place = next(i for i, param in enumerate(owner["params"]) if param is head)
    others, apart = dict(owner), {**owner, "params": [head], "lr": rate}
    others["params"] = [param for param in owner["params"] if param is not head]
    if names is not None:
        apart["param_names"] = [names[place]]
        others["param_names"] = [*names[:place], *names[place + 1 :]]
    at = next(i for i, group in enumerate(groups) if group is owner)
    kept = [others] if others["params"] or at == 0 else []
    return [*groups[:at], *kept, apart, *groups[at + 1 :]]
