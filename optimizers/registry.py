"""Optimizers by name: what is available, building one for a model, and its state in bytes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import methods as methods  # fills the table
from .engine import checks
from .engine.composition import Composition
from .engine.low_rank_gradients import examine
from .engine.method import TABLE, Method
from .engine.optimizer import LowRankOptimizer
from .engine.options import OF_BUILD, ProjectionOptions, make_plain
from .engine.parameters import check_placement, whole_shape
from .engine.replaced import Watch
from .engine.strategies import PROJECTORS, RESIDUALS, SCHEDULES, STORAGES
from .engine.warn import warn_user
from .layers.convert import check_converted, factored_layers, meta_copy
from .layers.optimizer import FactoredAdamW
from .plain_parts import APART, with_own_rates, with_plain_rule
from .pretrained import save_dense_weights
from .traffic import compared_bytes, step_bytes

#: Group options that `build` passes to plain parameters, too.
_EVERYWHERE = ("seed", "stochastic_rounding")

_CHOICES: dict[str, Collection[Any]] = {
    "projector": PROJECTORS,
    "schedule": SCHEDULES,
    "basis": STORAGES,
    "residual": RESIDUALS,
}


def available() -> list[str]:
    """Names that `build` accepts, sorted."""
    return sorted(TABLE)


def describe(name: str) -> str:
    """A one-line description of a method.

    Raises:
        ValueError: the name is unknown.
    """
    return _method(name).description()


def method_table() -> str:
    """All methods as a markdown table.

    The state's and the weights' sizes are those of an m x n matrix, m <= n, at rank r: entries in
    the tensor's precision, or bytes where stated; blocks' scales and step counts are omitted. What
    is kept of a gradient is that between micro-batches with `update_in_backward`.
    """
    rows = [
        "| name | class | what it is | optimizer state | weights | gradient kept |",
        "|---|---|---|---|---|---|",
    ]
    for name in available():
        row = TABLE[name]
        cells = (f"`{name}`", f"`{row.optimizer.__name__}`", row.linked(), row.state)
        rows.append(f"| {' | '.join(cells)} | {row.weights or 'm n'} | {_kept(name)} |")
    return "\n".join(rows)


def _kept(name: str) -> str:
    """What `update_in_backward` keeps of a matrix's gradient between micro-batches."""
    if issubclass(TABLE[name].optimizer, FactoredAdamW):
        return "the factors'"
    model = nn.ModuleDict({"attn_q_proj": nn.Linear(64, 32, bias=False)})
    model.config = SimpleNamespace(num_attention_heads=2)  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a model as small as this
        optimizer = build(name, model, rank=4)
    whole = any(isinstance(reason, str) for reason in examine(optimizer).values())
    return "m n" if whole else "n r"


def option_aliases(name: str) -> dict[str, str]:
    """Option names of a method's official code that differ from ours: {alias: ours}.

    Raises:
        ValueError: the name is unknown.
    """
    return dict(_method(name).optimizer.aliases)


def accepts(name: str, option: str) -> bool:
    """Whether a method's constructor has a keyword, such as `total_steps`.

    Raises:
        ValueError: the name is unknown.
    """
    return option in _method(name).constructor_options()


def without_effect(name: str, options: Mapping[str, Any]) -> list[str]:
    """Which of the options of `build` have no effect on a method, such as a baseline's `rank`.

    A seed is not told: nothing of a method without random numbers is other than was asked for.

    Args:
        name: one of `available()`.
        options: as for `build`.

    Raises:
        ValueError: the name or an option is unknown or out of range.
    """
    ignored = _sort_options(_method(name), dict(options)).ignored
    return [option for option, value in ignored.items() if value is not None and option != "seed"]


def _method(name: str) -> Method:
    if not isinstance(name, str):
        raise ValueError(
            f"name is a {type(name).__name__}: accepted is a name such as 'galore_adamw' "
            "(available() lists them)"
        )
    if name not in TABLE:
        raise checks.unknown_name("optimizer", name, TABLE)
    return TABLE[name]


def _check_model(model: Any, method: Method) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: accepted is an nn.Module; "
            f"{method.optimizer.__name__}(...) takes parameters or groups"
        )


class _Sorted(NamedTuple):
    """Options of `build`: the groups', the constructor's, and those without effect."""

    groups: dict[str, Any]
    keywords: dict[str, Any]
    ignored: dict[str, Any]


def _sort_options(method: Method, options: dict[str, Any]) -> _Sorted:
    """Sorts options by where they go; omits those of a conversion.

    Raises:
        ValueError: an option is unknown, or one of a projection is out of range, even where it has
            no effect.
    """
    constructor, groups = method.constructor_options(), method.group_options()
    conversion = method.conversion.options
    group_options: dict[str, Any] = {}
    keywords: dict[str, Any] = {**method.build}
    ignored: dict[str, Any] = {}
    for name, value in options.items():
        if name in conversion:
            if name in constructor:
                keywords[name] = value
            continue
        if name in (_EVERYWHERE if method.optimizer.projects else constructor):
            keywords[name] = value
        elif name in groups:
            own = (*OF_BUILD, *method.optimizer.hidden_keys)
            if method.optimizer.projects or name in own:
                group_options[name] = value
            else:
                if name in _CHOICES:
                    checks.choice(name, value, _CHOICES[name])
                ignored[name] = value
        elif name in constructor:
            keywords[name] = value
        else:
            known = constructor | groups | {*conversion}
            raise checks.unknown_name(f"option of {method.name}", name, known)
    ProjectionOptions(
        **{name: ignored[name] for name in ProjectionOptions.names() if name in ignored}
    )
    return _Sorted(group_options, keywords, ignored)


def convert(name: str, model: nn.Module, **options: Any) -> nn.Module:
    """Changes a model's parametrisation, in place, to the one that a method trains.

    `build` calls it. Call it yourself if, before `build`, the model is wrapped (DDP), moved, or
    loaded from a converted model's state dict (which a dense one can't load: in Lightning, whose
    checkpoints are read before `configure_optimizers`, call it in `__init__`). Methods without a
    parametrisation change nothing unless `weight_bits` is given, and converted layers are
    unchanged; `merge` undoes it. Processes that train together need equal models here, because DDP
    broadcasts quantised weights as dense copies, which are requantised. DDP ignores frozen tensors
    of factored layers if it wraps the given model or a part of it; if it wraps a parent module,
    pass that module here as well. `fully_shard` (FSDP2) comes between this and `build`; it shards
    factors and frozen weights, and leaves buffers whole on each process (LoQT's quantised weights,
    SwitchLoRA's candidates).

    Args:
        name: one of `available()`.
        model: the model.
        **options: as for `build`. Methods that leave layers as they are have `weight_bits` (8, 4,
            or None for dense weights, the default but for `qgalore_adamw_8bit`),
            `weight_group_size` (256 or 64), `weight_include` (any of "embeddings" and "head", to
            quantise these too) and `patterns`.

    Returns:
        The model.

    Raises:
        ValueError: the name or an option is unknown or out of range, no layer matches, or the model
            is converted already with another rank or the like.
    """
    method = _method(name)
    _check_model(model, method)
    make_plain(options)
    _sort_options(method, options)
    for called, param in model.named_parameters():
        check_placement(param, called)
    accepted = {*method.conversion.options, "patterns"}
    chosen = {key: options[key] for key in options if key in accepted}
    check_converted(model, chosen)
    method.conversion.apply(model, **chosen)
    save_dense_weights(model)
    return model


def build(
    name: str, model: nn.Module, lr: float | Tensor | None = None, **options: Any
) -> LowRankOptimizer:
    """Builds an optimizer for a model by name.

    Matrices of the hidden layers are projected (see `param_groups`), everything else gets the
    method's full-rank rule. Defaults: rank 128 (clamped to each matrix), gap 200, scale 0.25;
    Adafactor with `relative_step` and `scale_parameter` off. A method with its own parametrisation
    changes the model in place first, see `convert`.

    Args:
        name: one of `available()`.
        model: the model whose parameters are trained.
        lr: learning rate; the class's default when None.
        **options: group options (`rank`, `update_proj_gap`, `scale`, `proj_type`, `refresh`,
            `patterns`, ...); rates of their own for embeddings, head, norms and biases
            (`plain_lr`), for embeddings alone (`embedding_lr`) and the output head alone
            (`head_lr`); a rule for all of these other than the method's (`plain_rule`: "adamw",
            "adamw_8bit" or "adafactor", see `engine.plain_rules`); and constructor keywords of the
            class.
            Projection options of a method that has no projection are checked, and a warning says
            that they have no effect.

    Returns:
        A `torch.optim.Optimizer`.

    Raises:
        ValueError: the name or an option is unknown (the nearest one is named) or out of range.
    """
    method = _method(name)
    _check_model(model, method)
    make_plain(options)
    group_options, keywords, _ = _sort_options(method, options)
    idle = [f"{option}={options[option]!r}" for option in without_effect(name, options)]
    if idle:
        warn_user(f"{name}: {', '.join(idle)} has no effect on this method")
    if lr is not None:
        keywords["lr"] = lr
    if options.get("weight_bits", method.conversion.weight_bits) is not None:
        # Quantising loses the dense weights, so that options are tried before.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            template = _template(method, _groups(method, model, group_options), keywords)
            for group in template.param_groups:
                template.compose(group)
    convert(name, model, **options)
    groups = _groups(method, model, group_options)
    for option in options.keys() & keywords.keys():
        if all(option in group for group in groups) and option not in group_options:
            raise ValueError(
                f"{option}={options[option]!r}: {name} chooses it for each group of a model; "
                f"accepted is {option} in groups of your own"
            )
    optimizer = method.optimizer(groups, **keywords)
    if isinstance(optimizer, FactoredAdamW):
        optimizer.attach(model)
    optimizer._origin = Watch(model, optimizer.param_groups)
    return optimizer


def expected_state_bytes(name: str, model: nn.Module, world: int = 1, **options: Any) -> int:
    """Bytes of optimizer state by formula, with `build`'s defaults and options.

    The model may be on the meta device; only its shapes and dtypes are read.

    Args:
        name: one of `available()`.
        model: the model, whole.
        world: number of processes that its parameters are spread over by `fully_shard` (a dimension
            of the mesh). Moments fall as 1 / world, bases are whole on each process.
        **options: as for `build`.

    Returns:
        The integer that `state_bytes(build(name, model, **options))` measures, on the first of the
        processes, which holds the most.

    Raises:
        ValueError: as `build`, or `world` is not a positive integer.
    """
    checks.integer("world", world, low=1)
    total = 0
    for composition, _, params in _compositions(name, model, options):
        for param in params:
            shape = whole_shape(param)
            if shape.numel():
                total += composition.state_bytes(shape, param.element_size(), world)
    return total


def expected_weight_bytes(name: str, model: nn.Module, **options: Any) -> int:
    """Bytes of a model's parameters and buffers as `build` would leave them, by formula.

    Quantised weights count with codes and scales, tied ones once; buffers that a state dict leaves
    out count too.

    Args:
        name: one of `available()`.
        model: the model, which stays as it is; it may be on the meta device.
        **options: as for `build`.

    Raises:
        ValueError: as `build`.
    """
    made = convert(name, meta_copy(model), **options)
    host = [getattr(layer, n) for _, layer in factored_layers(made) for n in layer.host_tensors()]
    tensors = {id(tensor): tensor for tensor in (*made.parameters(), *made.buffers(), *host)}
    return sum(tensor.nbytes for tensor in tensors.values())


def expected_step_traffic(name: str, model: nn.Module, world: int, **options: Any) -> int:
    """Bytes that one process hands to collectives in a step on a sharded model, by formula.

    Between refreshes; what `fully_shard` sends is not counted. See `lowrank.optimizers.traffic`.

    Args:
        name: one of `available()`, but for methods that replace layers.
        model: the model, whole; it may be on the meta device.
        world: number of processes that parameters are spread over, at least 2.
        **options: as for `build`.

    Returns:
        Bytes, as a recorder of collectives measures them.

    Raises:
        ValueError: as `build`, or the method replaces layers.
    """
    checks.integer("world", world, low=2)
    conversion = _method(name).conversion
    if conversion.replaces_layers:
        raise ValueError(f"name={name!r}: accepted are methods that don't replace layers")
    total = compared = 0
    for composition, group, params in _compositions(name, model, options):
        checked = bool(group["skip_nonfinite"]) and not group["capturable"]
        for param in params:
            shape, itemsize = whole_shape(param), param.element_size()
            if shape.numel():
                total += step_bytes(composition, shape, itemsize, world, checked=checked)
                own = compared_bytes(composition, shape, param.dtype, checked=checked)
                compared = max(compared, own)
    return total + compared


def _groups(method: Method, model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of a model, by their options."""
    own = {name: value for name, value in options.items() if name not in (*APART, "plain_rule")}
    groups = with_own_rates(model, method.groups(model, **own), options)
    return with_plain_rule(model, groups, options, method.hidden)


def _template(
    method: Method, groups: Sequence[dict[str, Any]], keywords: dict[str, Any]
) -> LowRankOptimizer:
    """An optimizer of the same groups without parameters, which completes the defaults."""
    empty = [{**group, "params": [], "param_names": []} for group in groups]
    return method.optimizer(empty, **keywords)


def _compositions(
    name: str, model: nn.Module, options: dict[str, Any]
) -> Iterator[tuple[Composition, dict[str, Any], list[Tensor]]]:
    """The composition, completed options and parameters of each group that `build` would make."""
    method = _method(name)
    _check_model(model, method)
    make_plain(options)
    group_options, keywords, _ = _sort_options(method, options)
    if method.conversion.replaces_layers:
        model = convert(name, meta_copy(model), **options)
    groups = _groups(method, model, group_options)
    template = _template(method, groups, keywords)
    for group, completed in zip(groups, template.param_groups, strict=True):
        yield template.compose(completed), completed, list(group["params"])
