"""Parameter groups of a model: projected, plain with weight decay, plain without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from .coverage import projection_summary, tell, warn_of_left_out
from .engine.options import check_lr
from .engine.parameters import check_placement, whole_shape
from .layers.base import FactoredLinear
from .targets import Patterns, checked, selector

Group = dict[str, Any]

DEFAULT_RANK = 128
#: Options of `param_groups` that have no effect on factored layers.
_PROJECTION = (
    *("rank", "rank_ratio_matrix", "rank_ratio_cnn", "scale", "proj_type", "projector", "basis"),
    "residual",
)
#: Convolution weights with at most as many entries are not projected (COAP, released code).
SMALL_CONVOLUTION = 32 * 32 * 9
#: Options that determine the rank of a group.
SIZES = ("rank", "rank_ratio_matrix", "rank_ratio_cnn")


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Every trainable parameter once, under its first name, with the module that owns it.

    Raises:
        ValueError: one is sharded.
    """
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            frozen = isinstance(module, FactoredLinear) and name in module.FROZEN
            if param.requires_grad and not frozen and param not in seen:
                seen.add(param)
                whole = f"{prefix}.{name}" if prefix else name
                check_placement(param, whole)
                yield whole, param, module


def _tied(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that more than one module owns."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[param] = owners.get(param, 0) + 1
    return {param for param, count in owners.items() if count > 1}


def param_groups(
    model: nn.Module,
    *,
    patterns: Patterns = None,
    rank: int | None = None,
    weight_decay: float | None = None,
    plain_lr: float | torch.Tensor | None = None,
    **method_options: Any,
) -> list[Group]:
    """Makes parameter groups for a projecting optimizer.

    Projected is every matrix of the hidden layers: weights of `nn.Linear` and of transformers'
    `Conv1D` (as it is stored, input x output), the packed ones of `nn.MultiheadAttention`, and each
    expert of a parameter of E x m x n (E above 1, m and n at least 8; no convolution). Embeddings,
    heads and routers are not. Everything else is plain, split into matrices (decayed) and vectors
    such as biases and norms (not decayed). Tied weights appear once and are never projected.
    Parameter names are recorded. With `rank_ratio_cnn` (COAP) convolutions of more than 9216
    entries are projected too. For a model with factored layers (`convert`) see `factored_groups`.

    The logger "lowrank" is told once, at INFO, how much is projected, and which large parameters
    are not: the text of `projection_summary`. A warning says where less than three quarters of
    the hidden layers' entries are projected, and names the largest that are left out.

    Args:
        model: the model, before any wrapping that flattens parameters.
        patterns: what to project instead of all hidden layers: one pattern or several, each a
            part of a name (case matters) or, where it holds signs of regular expressions, an
            expression that matches a layer's whole name; `"all-linear"` is every linear layer, the
            head included. Lists for transformers' `optim_target_modules` work unchanged.
        rank: r of the projection, clamped to each matrix; 128 unless `rank_ratio_matrix` is given.
        weight_decay: of the first two groups; the optimizer's own when None.
        plain_lr: learning rate of what is not projected (embeddings, head, norms, biases); the
            optimizer's own when None. A projected update is `scale` times smaller, so the best
            rates of the two often differ.
        **method_options: further keys of the projected group: `update_proj_gap` (default 200),
            `scale` (0.25), `proj_type` ("std"), and the method's own.

    Returns:
        Groups, projected ones first; empty ones are left out.

    Raises:
        ValueError: no layer that is trained matches the patterns, no method has an option of
            a name that is given, or the model has factored layers and options of a projection are
            given.
    """
    _check_known(method_options)
    if any(isinstance(module, FactoredLinear) for module in model.modules()):
        given = {"patterns": patterns, "rank": rank}
        _refuse_projection(model, {**method_options, **given})
        return factored_groups(
            model, weight_decay=weight_decay, plain_lr=plain_lr, **method_options
        )
    if rank is None and method_options.get("rank_ratio_matrix") is None:
        rank = DEFAULT_RANK
    options = {"rank": rank, **method_options}
    projected, decayed, undecayed = split(model, patterns)
    convolutions: list[tuple[str, nn.Parameter]] = []
    if method_options.get("rank_ratio_cnn") is not None:
        tied = _tied(model)
        convolutions = [(n, p) for n, p in decayed if _is_large_convolution(p) and p not in tied]
        decayed = [(n, p) for n, p in decayed if all(p is not kernel for _, kernel in convolutions)]
    if not projected and not convolutions:
        raise no_match(model, patterns)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    rate = plain_rate(plain_lr)
    groups = [
        _group(projected, {**decay, **options}),
        _group(convolutions, {**decay, **options}),
        _group(decayed, {**decay, **rate}),
        _group(undecayed, {"weight_decay": 0.0, **rate}),
    ]
    groups = [group for group in groups if group["params"]]
    tell(projection_summary(groups))
    chosen = [name for name, _ in (*projected, *convolutions)]
    warn_of_left_out(model, chosen, "projected")
    return groups


def _check_known(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for an option that no method has: nothing would read the group key."""
    from .engine import checks  # the table of methods is made from pages that import this module
    from .engine.method import TABLE

    known = {name for row in TABLE.values() for name in row.group_options()}
    known |= {name for row in TABLE.values() for name in row.constructor_options()}
    for name in options.keys() - known:
        raise checks.unknown_name("option", name, known)


def factored_groups(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    plain_lr: float | torch.Tensor | None = None,
    **method_options: Any,
) -> list[Group]:
    """Groups of a model with factored layers: their factors, other matrices, vectors.

    Args:
        model: a converted model.
        weight_decay: as in `param_groups`.
        plain_lr: learning rate of what is not a factor.
        **method_options: further keys of the factors' group.

    Returns:
        Groups; empty ones are left out.

    Raises:
        ValueError: no layer is factored.
    """
    factors: list[tuple[str, nn.Parameter]] = []
    decayed: list[tuple[str, nn.Parameter]] = []
    undecayed: list[tuple[str, nn.Parameter]] = []
    for name, param, module in _parameters(model):
        own = isinstance(module, FactoredLinear) and name.rpartition(".")[2] in module.FACTORS
        (factors if own else decayed if len(whole_shape(param)) > 1 else undecayed).append(
            (name, param)
        )
    if not factors:
        raise ValueError(
            f"no layer of {type(model).__name__} is factored; accepted is a model after "
            "convert(name, model)"
        )
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    rate = plain_rate(plain_lr)
    groups = [
        _group(factors, {**decay, **method_options, "factors": True}),
        _group(decayed, {**decay, **rate}),
        _group(undecayed, {"weight_decay": 0.0, **rate}),
    ]
    return [group for group in groups if group["params"]]


def plain_groups(
    model: nn.Module,
    *,
    patterns: Patterns = None,
    weight_decay: float | None = None,
    plain_lr: float | torch.Tensor | None = None,
    apart: bool = False,
) -> list[Group]:
    """Groups without projection: matrices (decayed), then vectors (not decayed).

    Args:
        model: as in `param_groups`.
        patterns: as in `param_groups`; what matches is a hidden matrix.
        weight_decay: of the matrices; the optimizer's own when None.
        plain_lr: as in `param_groups`; hidden matrices keep the optimizer's.
        apart: return hidden matrices in a separate first group, even if it is empty.

    Returns:
        Groups; empty ones are left out.
    """
    hidden, decayed, undecayed = split(model, patterns)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    rate = plain_rate(plain_lr)
    if apart or plain_lr is not None:
        matrices = [_group(hidden, decay), _group(decayed, {**decay, **rate})]
    else:
        matrices = [_group(hidden + decayed, decay)]
    groups = [*matrices, _group(undecayed, {"weight_decay": 0.0, **rate})]
    return [group for i, group in enumerate(groups) if group["params"] or (apart and i == 0)]


def hidden_apart(model: nn.Module, how: str, **options: Any) -> tuple[Group, list[Group]]:
    """`plain_groups` of a method that treats hidden matrices in its own way: these, and the others.

    Args:
        model: the model.
        how: what becomes of hidden matrices, for the warning of what is left out.
        **options: of `plain_groups`.

    Raises:
        ValueError: there is no such matrix that is trained.
    """
    hidden, *others = plain_groups(model, **options, apart=True)
    if not hidden["params"]:
        raise no_match(model, options.get("patterns"))
    warn_of_left_out(model, hidden["param_names"], how)
    return hidden, others


def plain_rate(plain_lr: float | torch.Tensor | None) -> Group:
    """The learning rate of what is not projected, as options of its groups; none without one.

    Raises:
        ValueError: it is no number of at least 0.
    """
    if plain_lr is None:
        return {}
    check_lr(plain_lr, "plain_lr")
    return {"lr": plain_lr}


def split(model: nn.Module, patterns: Patterns) -> tuple[list[tuple[str, nn.Parameter]], ...]:
    """Named parameters as (to project, other matrices, vectors)."""
    tied, selects = _tied(model), selector(model, patterns)
    lists: tuple[list[tuple[str, nn.Parameter]], ...] = ([], [], [])
    for name, param, module in _parameters(model):
        target = param not in tied and selects(name, param, module)
        matrix = len(whole_shape(param)) > 1
        lists[0 if target else 1 if matrix else 2].append((name, param))
    return lists


def projected_layers(model: nn.Module, patterns: Patterns) -> list[nn.Linear]:
    """The layers whose weights `param_groups` projects.

    Raises:
        ValueError: no linear layer that is trained matches the patterns.
    """
    tied, selects = _tied(model), selector(model, patterns)
    layers = [
        module
        for name, param, module in _parameters(model)
        if isinstance(module, nn.Linear) and param not in tied and selects(name, param, module)
    ]
    if not layers:
        raise no_match(model, patterns)
    return layers


def _is_large_convolution(param: torch.Tensor) -> bool:
    shape = whole_shape(param)
    return len(shape) == 4 and shape.numel() > SMALL_CONVOLUTION


def no_match(model: nn.Module, patterns: Patterns) -> ValueError:
    """The error for patterns that select no matrix that can be trained as they ask."""
    selects, named = selector(model, patterns), checked(patterns)
    found = [
        (f"{name}.{key}" if name else key, param)
        for name, module in model.named_modules()
        for key, param in module.named_parameters(recurse=False)
        if selects(f"{name}.{key}" if name else key, param, module)
    ]
    kind, of = type(model).__name__, f" of {named}" if named is not None else ""
    frozen = [name for name, param in found if not param.requires_grad]
    if frozen and len(frozen) == len(found):
        return ValueError(
            f"each layer of {kind} that the patterns{of} select is frozen, {len(frozen)} of them, "
            f"such as {frozen[0]}: accepted are layers whose weight has requires_grad=True, or "
            "patterns that match such"
        )
    if found:
        return ValueError(
            f"each layer of {kind} that the patterns{of} select is tied, frozen or no nn.Linear, "
            f"such as {found[0][0]}: accepted are patterns that match others"
        )
    lacking = f"has one of {named} in its name" if named else "is in a list of blocks, or named so"
    others = ""
    if any(_is_large_convolution(param) for param in model.parameters()):
        others = ", or rank_ratio_cnn=4 with COAP's methods, which project its convolutions"
    return ValueError(
        f"no nn.Linear of {kind} {lacking}; accepted are patterns that match one, such as "
        f'patterns="all-linear"{others}'
    )


def _refuse_projection(model: nn.Module, options: Group) -> None:
    """Raises `ValueError` for projection options, which groups of factors would ignore."""
    given = [name for name in ("patterns", *_PROJECTION) if options.get(name) is not None]
    if given:
        said = ", ".join(f"{name}={options[name]!r}" for name in given)
        raise ValueError(
            f"{said} for a {type(model).__name__} with factored layers, of which nothing is "
            f"projected: accepted are param_groups(model) without {', '.join(given)}, or "
            "merge(model) before, which makes all layers dense"
        )


def _group(named: Sequence[tuple[str, torch.Tensor]], options: Group) -> Group:
    return {
        "params": [param for _, param in named],
        "param_names": [name for name, _ in named],
        **options,
    }


def is_sized(group: Mapping[str, Any]) -> bool:
    """Whether a group has a rank or ratio."""
    return any(group.get(name) is not None for name in SIZES)


def sorted_groups(params: ParamsT, **sizes: Any) -> ParamsT:
    """Sorts parameters as the released code if a rank is given with plain `params`.

    Matrices whose shorter side exceeds the rank are projected, embeddings included; 4-D weights
    with more than 9216 entries too where `rank_ratio_cnn` is given; all others are plain. Groups
    are not split; those with `proj_method` get the sizes that they lack.

    Args:
        params: parameters, named parameters or groups.
        **sizes: each of `SIZES`, None if not given.

    Raises:
        ValueError: a rank or ratio is given with groups, none of which is projected.
    """
    given: list[Any] = list(params)
    if any(isinstance(entry, dict) for entry in given):
        return _completed(given, {k: v for k, v in sizes.items() if v is not None})
    if not is_sized(sizes):
        return given
    kinds: dict[str, list[Any]] = {"plain": [], "matrix": [], "convolution": []}
    for entry in given:
        kinds[_kind(entry[1] if isinstance(entry, tuple) else entry, sizes)].append(entry)
    own: dict[str, Group] = {
        "plain": {},
        "matrix": {name: sizes[name] for name in SIZES[:2]},
        "convolution": {"rank_ratio_cnn": sizes["rank_ratio_cnn"]},
    }
    return [{"params": members, **own[kind]} for kind, members in kinds.items() if members]


def _kind(param: Tensor, sizes: Group) -> str:
    rank, ratio, shape = sizes["rank"], sizes["rank_ratio_matrix"], whole_shape(param)
    if len(shape) == 2 and (ratio is not None or rank is not None):
        return "matrix" if ratio is not None or min(shape) > rank else "plain"
    if sizes["rank_ratio_cnn"] is not None and _is_large_convolution(param):
        return "convolution"
    return "plain"


def _completed(groups: list[Any], sizes: Group) -> list[Any]:
    """Completes groups to be projected with the constructor's rank and ratios."""
    made = []
    for group in groups:
        if isinstance(group, dict) and is_sized(group):
            # The group's own rank is kept; convolutions in it still need their ratio.
            ratio = sizes.get("rank_ratio_cnn")
            if ratio is not None and group.get("rank_ratio_cnn") is None:
                group = {**group, "rank_ratio_cnn": ratio}
        elif isinstance(group, dict) and "proj_method" in group:
            group = {**group, **sizes}
        made.append(group)
    if sizes and not any(isinstance(group, dict) and is_sized(group) for group in made):
        name, value = next(iter(sizes.items()))
        raise ValueError(
            f"{name}={value!r} beside groups none of which is projected: accepted with "
            "proj_method='coap' in those to project, or with plain parameters"
        )
    return made
