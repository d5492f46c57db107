"""DistributedDataParallel that sends projected gradients between refreshes.

A communication hook: of each bucket it projects the gradients of matrices that are not due for a
refit (`low_rank_gradients`), sends them together with the bucket's other gradients in one
all-reduce, and fills in what the means stand for. A matrix of m x n at rank r takes r / min(m, n)
of the traffic, and its `.grad` is the projection of the mean gradient to the subspace. In the step
of a refit its gradient travels as a whole, and so do all after options or state were changed.

All processes must decide alike, and their bases must be equal: what P^T G is in other coordinates
can't be added. So refits are shared (`share_refreshes`), and the processes compare what they would
send before they do (`low_rank_comparison`).
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.futures import Future

from .low_rank_comparison import CHANGED, EACH, Comparison
from .low_rank_gradients import Place, examine, places
from .optimizer import LowRankOptimizer, no_autocast
from .parameters import label, names
from .warn import warn_user
from .zero import partitioned

_ABSENT = "the optimizer doesn't have it"


class GradientTraffic(NamedTuple):
    """Bytes that one process hands to the all-reduces of a backward pass.

    Attributes:
        whole: of all gradients, as without the hook.
        between: in a step in which no matrix is refitted, with the comparison of the processes.
        next: in the next step, as options and state are now.
    """

    whole: int
    between: int
    next: int

    @property
    def saved(self) -> float:
        """The share of the bytes that is saved between refreshes, in [0, 1)."""
        return 1.0 - self.between / self.whole


class _Projected(NamedTuple):
    """A parameter whose gradient was projected, and its version then."""

    name: str
    param: Tensor
    version: int


class LowRankHook:
    """A registered hook; see `register_low_rank_hook`, which makes it."""

    def __init__(self, model: nn.parallel.DistributedDataParallel, optimizer: LowRankOptimizer):
        self._model = weakref.ref(model)  # which keeps the hook
        self._group = model.process_group
        self._world = distributed.get_world_size(self._group)
        self._optimizer = optimizer
        ignored = model.parameters_to_ignore
        self._params = [
            (name, param)
            for name, param in model.module.named_parameters()
            if param.requires_grad and name not in ignored
        ]
        self._shared = optimizer._shared
        self._places: dict[int, Place] | None = None
        self._bucket = -1
        self._comparison = Comparison(self._params, optimizer, self._group)
        #: Parameters whose gradients were projected since the last step, by id.
        self._projected: dict[int, _Projected] = {}
        self._warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankHook:
        """The same hook: copies of the model don't call it."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model with a low-rank hook can't be pickled: accepted is the state_dict() of its "
            "module"
        )

    def __repr__(self) -> str:
        traffic, count = self.traffic(), len(self._params) - len(self.whole())
        return (
            f"LowRankHook({count} of {len(self._params)} gradients travel as projections: "
            f"{traffic.between} bytes between refreshes instead of {traffic.whole}, "
            f"{traffic.saved:.0%} saved)"
        )

    def whole(self) -> dict[str, str]:
        """Parameters whose gradients always travel whole, and why: {name: reason}."""
        known = examine(self._optimizer)
        found = {name: known.get(id(param), _ABSENT) for name, param in self._params}
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}

    def traffic(self) -> GradientTraffic:
        """Bytes of a backward pass that synchronises, by formula; see `GradientTraffic`.

        The comparisons and bases that `share_refreshes` sends in `step` are not counted.
        """
        chosen, known = places(self._optimizer), examine(self._optimizer)
        whole = between = following = 0
        for _, param in self._params:
            size, least = param.numel(), known.get(id(param), _ABSENT)
            now = chosen[id(param)].entries() if id(param) in chosen else size
            whole += size * param.element_size()
            between += (size if isinstance(least, str) else least) * param.element_size()
            following += now * param.element_size()
        following += CHANGED if chosen and self._comparison.changed() else 0
        return GradientTraffic(whole, between + EACH, following + EACH)

    # In the backward pass

    @torch.no_grad()
    def reduce(self, bucket: Any) -> Future[Tensor]:
        """Averages a bucket over the processes.

        Args:
            bucket: a `torch.distributed.GradBucket`.

        Raises:
            ValueError: `model.join()` is used, or the processes have different states.
        """
        with no_autocast():
            chosen = self._decide(bucket)
            params, grads = bucket.parameters(), bucket.gradients()
            own = [chosen.get(id(param)) for param in params]
            for param, place in zip(params, own, strict=True):
                self._note(param, place)
            if not any(own):
                return self._average(bucket.buffer()).then(_first)
            pairs = list(zip(own, grads, strict=True))
            parts = [grad if place is None else place.project(grad) for place, grad in pairs]
            sent = torch.cat([part.reshape(-1) for part in parts])
            del parts
        buffer: Tensor = bucket.buffer()

        @torch.no_grad()
        def fill(done: Future[Any]) -> Tensor:
            sizes = [grad.numel() if place is None else place.entries() for place, grad in pairs]
            pieces = _first(done).split_with_sizes(sizes)
            with no_autocast():  # another thread
                for (place, grad), piece in zip(pairs, pieces, strict=True):
                    if place is None:
                        grad.copy_(piece.view(grad.shape))
                    else:
                        place.expand(piece, grad)
            return buffer

        return self._average(sent).then(fill)

    def _average(self, tensor: Tensor) -> Future[Any]:
        """In place, when it is done; as DDP, divides before the sum."""
        tensor.mul_(1.0 / self._world)
        work = distributed.all_reduce(tensor, group=self._group, async_op=True)
        assert work is not None
        future: Future[Any] = work.get_future()
        return future

    def _decide(self, bucket: Any) -> dict[int, Place]:
        """What travels as projections in this backward pass, the same for all its buckets."""
        model = self._model()
        if model is not None and model._join_config.enable:
            raise ValueError(
                "join() of a model with a low-rank hook: accepted are equally many batches on all "
                "processes; one that has joined takes no steps, and knows no refreshes"
            )
        if self._optimizer._shared is not self._shared:
            _check_sharing(self._optimizer, self._group)
            self._shared = self._optimizer._shared
        if self._places is None or bucket.index() <= self._bucket:
            self._warn_of_others()
            self._places = places(self._optimizer)
            self._comparison.run(self._places, bucket.buffer().device)
        self._bucket, chosen = bucket.index(), self._places
        if bucket.is_last():
            self._places = None
        return chosen

    def _note(self, param: Tensor, place: Place | None) -> None:
        if place is None:
            self._projected.pop(id(param), None)
        else:
            name = label(place.plan.names[place.position], param)
            self._projected[id(param)] = _Projected(name, param, param._version)

    def _warn_of_others(self) -> None:
        """If weights changed without a step: another optimizer may have taken it."""
        changed = [own for own in self._projected.values() if own.param._version != own.version]
        if changed and not self._warned:
            self._warned = True
            warn_user(
                f"{changed[0].name} was changed since the last backward pass, without a step of "
                f"the {type(self._optimizer).__name__} by whose projections gradients travel: only "
                "with its steps are they refitted; for another optimizer wrap the model in a new "
                "DistributedDataParallel (warned once)"
            )

    # In the step

    def before_step(self, *_: object) -> None:
        """Raises `ValueError` if a matrix is to be refitted whose gradient was projected."""
        if self._projected:
            still = places(self._optimizer)
            for key, own in self._projected.items():
                if key not in still:
                    raise ValueError(
                        "options or state were changed after the backward pass, in which only a "
                        f"projection of the gradient of {own.name} was sent, and the change calls "
                        "for all of it: accepted is a change before the backward pass "
                        "(zero_grad() and another one now)"
                    )

    def after_step(self, *_: object) -> None:
        """Forgets the gradients of the step."""
        self._projected.clear()
        self._places = None


def _first(done: Future[Any]) -> Tensor:
    value = done.value()
    tensor: Tensor = value[0] if isinstance(value, list | tuple) else value
    return tensor


# Registration


def register_low_rank_hook(
    ddp_model: nn.parallel.DistributedDataParallel, optimizer: LowRankOptimizer
) -> LowRankHook:
    """Between refreshes sends projected gradients, r x n or m x r, instead of whole ones.

    Call it on every process, after the optimizer is built and before the first backward pass. It is
    exact where a method uses the gradient through its projection alone: GaLore, Q-GaLore, GaLore+,
    COAP and Muon in GaLore's subspace, whatever their moments; other parameters' gradients travel
    as they are. Weights are those of plain DDP, up to rounding. Refreshes are shared from then on
    (`share_refreshes`), because projections only add up in equal bases.

    After a backward pass that synchronises, `.grad` of such a matrix is the mean gradient's
    projection to its subspace, m x n as ever. So accumulation (`no_sync()`), `GradScaler` and
    `skip_nonfinite` need no change, and `clip_grad_norm_` clips by the projected norm: smaller than
    the whole one, except for the matrices that are refitted in the step. After options were
    changed, other than scalars as weight decay, or a state was loaded, the next gradients travel
    whole.

    DDP can't remove a hook, nor have a second one.

    Args:
        ddp_model: the wrapped model.
        optimizer: of its parameters.

    Returns:
        The hook, whose `traffic()` has the bytes of a step by formula, and `whole()` what travels
        whole and why.

    Raises:
        TypeError: no DDP model, or no optimizer of this package.
        ValueError: the model has a hook already; a projected matrix is not the model's; projections
            save nothing, or the method needs whole gradients; refreshes are shared among other
            processes; `capturable=True`.
    """
    if not isinstance(ddp_model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"{type(ddp_model).__name__}: accepted is a DistributedDataParallel model (the model "
            "inside of torch.compile)"
        )
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__}: accepted is an optimizer of lowrank.optimizers"
        )
    _check_model(ddp_model)
    hook = LowRankHook(ddp_model, optimizer)
    _check_optimizer(hook, optimizer)
    _check_sharing(optimizer, ddp_model.process_group)
    try:
        ddp_model.register_comm_hook(hook, _reduce)
    except RuntimeError as error:
        raise ValueError(f"a second communication hook on a DDP model: {error}") from error
    if optimizer._shared is None:
        optimizer.share_refreshes(ddp_model.process_group)
    optimizer.register_step_pre_hook(hook.before_step)
    optimizer.register_step_post_hook(hook.after_step)
    return hook


def _reduce(state, bucket):  # type: ignore[no-untyped-def]
    """What DDP calls; it accepts no annotations that are strings."""
    return state.reduce(bucket)


def _check_model(model: nn.parallel.DistributedDataParallel) -> None:
    if model._comm_hooks:
        called = getattr(model._comm_hooks[0][0], "__qualname__", model._comm_hooks[0][0])
        if called == _reduce.__qualname__:
            called = "register_low_rank_hook"
        raise ValueError(
            f"the model has the communication hook {called} already: accepted is a DDP model "
            "without one (mixed_precision and optimizers in the backward pass are hooks too)"
        )
    if model._use_python_reducer:
        raise ValueError(
            "torch._dynamo.config.optimize_ddp='python_reducer': accepted are the other values"
        )


def _check_sharing(optimizer: LowRankOptimizer, group: distributed.ProcessGroup) -> None:
    shared, ranks = optimizer._shared, distributed.get_process_group_ranks(group)
    if shared is not None and not {*ranks} <= {*distributed.get_process_group_ranks(shared.group)}:
        raise ValueError(
            "share_refreshes(process_group) among other processes than the model's: accepted are "
            f"all of {ranks}"
        )


def _check_optimizer(hook: LowRankHook, optimizer: LowRankOptimizer) -> None:
    if optimizer._in_backward is not None:
        raise ValueError(
            "a low-rank hook with update_in_backward, before DDP averages the gradients: accepted "
            "is one of the two (fully_shard goes with update_in_backward)"
        )
    plans = optimizer._plans.values()
    if any(partitioned(param) for plan in plans for param in plan.params):
        raise ValueError(
            "a low-rank hook with an optimizer that DeepSpeed has: accepted is that of a "
            "DistributedDataParallel model"
        )
    if any(group["capturable"] for group in optimizer.param_groups):
        raise ValueError(
            "capturable=True with a low-rank hook: accepted is False; what travels depends on the "
            "step count, which is then on the device"
        )
    known = examine(optimizer)
    own = {id(param) for _, param in hook._params}
    reasons: dict[str, str] = {}
    for group in optimizer.param_groups:
        for param, name in zip(group["params"], names(group), strict=True):
            found = known[id(param)]
            if isinstance(found, str):
                reasons.setdefault(found, label(name, param))
            elif param.requires_grad and id(param) not in own:
                raise ValueError(
                    f"{label(name, param)} is projected and not among the gradients that this "
                    "model synchronises: accepted is the optimizer of the model's parameters"
                )
    if not any(isinstance(found, int) for found in known.values()):
        listed = "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
        raise ValueError(
            f"{type(optimizer).__name__} has no matrix whose projected gradient could travel "
            f"instead of the whole one ({listed}): accepted are projected matrices with "
            "residual='dropped' and another projector than 'online'"
        )
