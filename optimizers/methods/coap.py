"""COAP: a projection that follows the correlation of gradient and momentum.

Chen et al., "COAP: Memory-Efficient Training with Correlation-Aware Gradient Projection", CVPR 2025
(arXiv 2412.00071). At multiples of `update_interval` the basis takes one step on its loss, at every
`reproject_factor`-th of them it is re-projected by a warm-started sketch (see
`projectors.correlation`); then, with R the projection, as GaLore:

    W <- W - s_t scale up(Adam(R)),    then decay

Memory per m x n matrix: min(m, n) r for P and 2 max(m, n) r for the moments. Convolutions (4-D
weights) are projected on both channel axes where `rank_ratio_cnn` is given (`projectors.tucker`).

The defaults are the released code's. Its quirks, and what mends them: the P step is a no-op at
language models' gradient scale (`normalize_gradient=True`); moments are kept when P changes
(`restore_state=True`, the same as `moments="restore"`, carries them over). Not followed: Adafactor
without `beta1` fails there at the first P step, here the cosine is left out of the loss; gradients
of convolutions' factors pile up there from one P step to the next; 8-bit moments are quantised
there in blocks of 4096 with the signed map for both, here in blocks of 256 with an unsigned one for
the second; tensors of 4-D below 9217 entries are not projected there when `params` is given, and
here neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine import checks
from ..engine.composition import Composition
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.projected import ProjectedAdafactor, ProjectedAdamW, ProjectedAdamW8bit
from ..engine.rule_factories import adafactor8bit_rule, adam8bit_rule
from ..engine.strategies import projection_of
from ..param_groups import SMALL_CONVOLUTION


class Coap(LowRankOptimizer):
    """What the four classes share: the released code's group keys and its automatic sorting.

    Group keys: `rank` or `rank_ratio_matrix`, `rank_ratio_cnn`, `update_interval` (another name of
    `update_proj_gap`), `reproject_factor`, `restore_state`, `scale`, `coap_lr`,
    `normalize_gradient`. A rank or ratio switches projection on; so does `proj_method` ("coap"),
    with the constructor's rank or ratios.
    """

    projection_defaults: ClassVar[Mapping[str, Any]] = {
        "projector": "coap",
        "update_proj_gap": 32,
        "scale": 1.0,
    }
    aliases: ClassVar[Mapping[str, str]] = {"update_interval": "update_proj_gap"}

    def __init__(
        self,
        params: ParamsT | None = None,
        *rule: Any,
        grouped_params_with_proj: ParamsT | None = None,
        proj_method: str = "coap",
        rank: int | None = None,
        rank_ratio_matrix: float | None = None,
        rank_ratio_cnn: float | None = None,
        restore_state: bool | None = None,
        update_interval: int | None = None,
        **options: Any,
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups; with a rank here, plain parameters are sorted as
                `sorted_groups` says.
            *rule: the update rule's arguments, `lr` first.
            grouped_params_with_proj: groups, instead of `params`.
            proj_method: "coap".
            rank: of the matrices that are sorted out of `params`, or lie in groups that have
                `proj_method` but no rank or ratio.
            rank_ratio_matrix: min(m, n) over their rank, instead of `rank`.
            rank_ratio_cnn: of 4-D weights, sorted out of `params` or in projected groups.
            restore_state: carry the moments over when the basis changes.
            update_interval: steps between changes of the basis, 32 unless given.
            **options: the update rule's keywords, and see `ProjectionKeywords`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        if (params is None) == (grouped_params_with_proj is None):
            raise ValueError("params and grouped_params_with_proj: accepted is exactly one of them")
        checks.choice("proj_method", proj_method, ("coap",))
        common: Group = {}
        if restore_state is not None:
            common["restore_state"] = restore_state
        if update_interval is not None:
            common["update_proj_gap"] = update_interval
        if "moments" in options:
            common["moments"] = options.pop("moments")
        _restoring(common)
        given = params if params is not None else grouped_params_with_proj
        assert given is not None
        made = sorted_groups(
            given,
            rank=rank,
            rank_ratio_matrix=rank_ratio_matrix,
            rank_ratio_cnn=rank_ratio_cnn,
        )
        # The next class is a projected one, whose constructor takes a rule's keywords.
        initialise: Any = super().__init__
        initialise(made, *rule, **common, **options)

    @classmethod
    def group_keys(cls) -> set[str]:
        """See `LowRankOptimizer.group_keys`."""
        return {*super().group_keys(), "proj_method", "restore_state"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, see `LowRankOptimizer`; the released code's keys are translated.

        Raises:
            ValueError: as in the constructor, and for `proj_method` in a group without a rank.
        """
        if isinstance(param_group, dict):
            _translate(param_group)
        super().add_param_group(param_group)


#: What says how far a group is projected.
SIZES = ("rank", "rank_ratio_matrix", "rank_ratio_cnn")


def _sized(group: Mapping[str, Any]) -> bool:
    return any(group.get(name) is not None for name in SIZES)


def _translate(group: Group) -> None:
    """In place: the released code's keys in our options."""
    if "proj_method" in group:
        method = group.pop("proj_method")
        checks.choice("proj_method", method, ("coap",))
        if not _sized(group):
            raise ValueError(
                f"proj_method={method!r} in a group without a rank: accepted with one of "
                f"{', '.join(SIZES)}, in the group or beside the groups"
            )
    _restoring(group)
    alone = group.get("rank") is None and group.get("rank_ratio_matrix") is None
    if alone and group.get("rank_ratio_cnn") is not None:
        # A group of convolutions; the ratio of matrices switches projection on.
        group["rank_ratio_matrix"] = group["rank_ratio_cnn"]


def _restoring(group: Group) -> None:
    """In place: `restore_state` as `moments`."""
    if "restore_state" in group:
        restore = group.pop("restore_state")
        checks.choice("restore_state", restore, (True, False))
        wanted = "restore" if restore else "keep"
        if group.setdefault("moments", wanted) != wanted:
            raise ValueError(
                f"restore_state={restore} with moments={group['moments']!r}: accepted is "
                f"{wanted!r}, or one of the two"
            )


def sorted_groups(
    params: ParamsT,
    *,
    rank: int | None = None,
    rank_ratio_matrix: float | None = None,
    rank_ratio_cnn: float | None = None,
) -> ParamsT:
    """Parameters sorted as the released code does where a rank is given beside plain `params`.

    Matrices whose shorter side exceeds the rank are projected, embeddings included; 4-D weights
    with more than 9216 entries too where `rank_ratio_cnn` is given; all others are plain. Groups
    stay together; those with `proj_method` take what they lack.

    Raises:
        ValueError: a rank or ratio is given beside groups, none of which is projected.
    """
    given = list(params)
    sizes = {"rank": rank, "rank_ratio_matrix": rank_ratio_matrix, "rank_ratio_cnn": rank_ratio_cnn}
    if any(isinstance(p, dict) for p in given):
        return _completed(given, {k: v for k, v in sizes.items() if v is not None})
    by_matrix = rank is not None or rank_ratio_matrix is not None
    if not _sized(sizes):
        return given  # type: ignore[return-value]
    kinds: dict[str, list[Any]] = {"plain": [], "matrix": [], "convolution": []}
    for entry in given:
        param: Tensor = entry[1] if isinstance(entry, tuple) else entry  # type: ignore[assignment]
        kind = "plain"
        if param.dim() == 2 and by_matrix:
            fits = rank_ratio_matrix is not None or min(param.shape) > (rank or 0)
            kind = "matrix" if fits else "plain"
        elif param.dim() == 4 and rank_ratio_cnn is not None and param.numel() > SMALL_CONVOLUTION:
            kind = "convolution"
        kinds[kind].append(entry)
    own: dict[str, Group] = {
        "plain": {},
        "matrix": {"rank": rank, "rank_ratio_matrix": rank_ratio_matrix},
        "convolution": {"rank_ratio_cnn": rank_ratio_cnn},
    }
    return [{"params": members, **own[kind]} for kind, members in kinds.items() if members]


def _completed(groups: Sequence[Any], sizes: Group) -> list[Any]:
    """Groups that are to be projected, with the constructor's rank and ratios where they lack."""
    made = []
    for group in groups:
        if isinstance(group, dict) and _sized(group):
            # A rank of its own stands; convolutions beside the matrices still need their ratio.
            ratio = {
                k: v for k, v in sizes.items() if k == "rank_ratio_cnn" and group.get(k) is None
            }
            group = {**group, **ratio}
        elif isinstance(group, dict) and "proj_method" in group:
            group = {**group, **sizes}
        made.append(group)
    if sizes and not any(isinstance(group, dict) and _sized(group) for group in made):
        name, value = next(iter(sizes.items()))
        raise ValueError(
            f"{name}={value!r} beside groups none of which is projected: accepted with "
            "proj_method='coap' in those to project, or with plain parameters"
        )
    return made


class CoapAdamW(Coap, ProjectedAdamW):
    """COAP with AdamW; with `refresh="svd"` numerically the released class.

    Keywords are `Coap`'s and `GaLoreAdamW`'s.
    """


class CoapAdamW8bit(Coap, ProjectedAdamW8bit):
    """COAP with block-wise 8-bit Adam moments; the rule is `CoapAdamW`'s."""

    def __init__(
        self,
        params: ParamsT | None = None,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
        quantizer: str = "native",
        **options: Any,
    ) -> None:
        """Makes the optimizer.

        Args:
            params: as in `Coap`.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the moments.
            eps: added to sqrt(V) before bias correction.
            weight_decay: decoupled, after the update.
            min_8bit_size: (projected) gradients with fewer entries keep fp32 moments.
            quantizer: "native" or "bitsandbytes".
            **options: further keywords of `Coap`, and see `ProjectionKeywords`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
            quantizer=quantizer,
            **options,
        )

    def compose(self, group: Group) -> Composition:
        """8-bit Adam in transformers' form and the group's projection."""
        rule = adam8bit_rule(group, eps_corrected=False, decay_first=False)
        return Composition(rule, projection_of(group))


class CoapAdafactor(Coap, ProjectedAdafactor):
    """COAP with Adafactor; with `refresh="svd"` and a `beta1` numerically the released class.

    Keywords are `Coap`'s and `GaLoreAdafactor`'s, but for `lr` 1e-3.
    """

    def __init__(
        self, params: ParamsT | None = None, lr: float | Tensor | None = 1e-3, **options: Any
    ) -> None:
        """Makes the optimizer; see the class.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        super().__init__(params, lr=lr, **options)


class CoapAdafactor8bit(CoapAdafactor):
    """COAP with Adafactor whose first moment is stored in 8 bits.

    Keywords are `CoapAdafactor`'s but for `beta1`, 0.9 unless given (without a first moment there
    is nothing to quantise), and `min_8bit_size` and `quantizer` as in `CoapAdamW8bit`.
    """

    def __init__(
        self,
        params: ParamsT | None = None,
        lr: float | Tensor | None = 1e-3,
        beta1: float | None = 0.9,
        min_8bit_size: int = 4096,
        quantizer: str = "native",
        **options: Any,
    ) -> None:
        """Makes the optimizer; see the class.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        super().__init__(
            params,
            lr=lr,
            beta1=beta1,
            min_8bit_size=min_8bit_size,
            quantizer=quantizer,
            **options,
        )

    @classmethod
    def keywords(cls) -> set[str]:
        """See `LowRankOptimizer.keywords`."""
        return {*super().keywords(), "min_8bit_size", "quantizer"}

    def compose(self, group: Group) -> Composition:
        """Adafactor with an 8-bit first moment and the group's projection."""
        return Composition(adafactor8bit_rule(group), projection_of(group))
