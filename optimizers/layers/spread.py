"""A layer's tensors whose rows are spread over processes, by FSDP2 or by DeepSpeed's ZeRO.

Outside a forward or backward pass `fully_shard` leaves DTensors in the place of parameters; in a
step under ZeRO there are row blocks (`layers.partitioned`). Events work on the rows that are here;
vectors and factors are gathered, dense weights never are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..engine.geometry import RowRange
from ..engine.parameters import is_cut
from ..engine.processes import Processes
from ..engine.row_block import RowBlock
from ..engine.sharding import is_dtensor, local_part, shard_of


@dataclass(frozen=True)
class HeldRows:
    """The rows of a tensor that are on this process; every process calls the same methods.

    Attributes:
        local: the rows, written in place.
        span: which of the whole tensor's rows they are.
        count: rows of the whole tensor.
    """

    local: Tensor
    span: RowRange
    count: int

    @property
    def rows(self) -> slice:
        """Their positions in the whole tensor."""
        return slice(self.span.start, self.span.stop)

    @property
    def processes(self) -> Processes:
        """Those that hold the other rows."""
        return self.span.processes

    def whole(self) -> Tensor:
        """The whole tensor; `local` itself if all rows are here."""
        return self.span.assemble(self.local)

    def at(self, span: RowRange) -> Tensor:
        """Those rows of the whole tensor that this process holds of another one.

        Args:
            span: the other tensor's; a gather, unless it is this tensor's on all processes.
        """
        return self.local if span == self.span else self.whole()[span.start : span.stop]

    def take(self, span: RowRange, rows: Tensor) -> None:
        """In place: the inverse of `at`, from `rows` that each process has."""
        if span == self.span:
            self.local.copy_(rows)
        else:
            self.fill(span.assemble(rows))

    def fill(self, whole: Tensor) -> None:
        """In place: takes the rows held from a whole tensor."""
        self.local.copy_(whole[self.rows])

    def pick(self, at: Tensor) -> Tensor:
        """Rows by their positions in the whole tensor, on every process.

        Args:
            at: (k,) distinct positions, on the tensor's device.
        """
        if self.processes.alone:
            return self.local[at]
        picked = self.local.new_zeros(len(at), *self.local.shape[1:])
        here, own = self._held(at)
        picked[here] = self.local[own]
        return self.processes.sum(picked)

    def put(self, at: Tensor, values: Tensor | float) -> None:
        """In place: sets rows by their positions in the whole tensor.

        Args:
            at: as in `pick`.
            values: k rows, or a number.
        """
        if not self.processes.alone:
            here, at = self._held(at)
            values = values[here] if isinstance(values, Tensor) else values
        if isinstance(values, Tensor):
            self.local[at] = values
        else:
            self.local.index_fill_(0, at, values)

    def _held(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some positions are here, and where in `local`."""
        here = (at >= self.span.start) & (at < self.span.stop)
        return here, at[here] - self.span.start


def held_rows(tensor: Tensor, of: Tensor | None = None) -> HeldRows:
    """The rows of a parameter or of its moments; all of a plain tensor's.

    Args:
        tensor: the parameter, or an entry of its state with as many rows.
        of: the parameter that a state belongs to; its row blocks have plain tensors in the state.
    """
    local: Tensor = local_part(tensor.detach())
    owner = of if isinstance(of, RowBlock) else tensor
    return HeldRows(local, shard_of(owner).rows, owner.shape[0])


def check_whole(module: nn.Module, called: str = "") -> None:
    """Raises `ValueError` if parameters of a module are spread over processes.

    Args:
        module: whose dense weights are to be made.
        called: its name in the message.
    """
    if any(is_dtensor(param) for param in module.parameters()):
        raise ValueError(
            f"{called or type(module).__name__} is inside fully_shard (its parameters are "
            "DTensors), so that no process has its dense weight: accepted is a converted model "
            "that is not sharded, after load_state_dict(get_model_state_dict(sharded, options="
            "StateDictOptions(full_state_dict=True)))"
        )
    if any(is_cut(param) for param in module.parameters()):
        raise ValueError(
            f"{called or type(module).__name__} is cut by ZeRO stage 3, so that no process has its "
            "dense weight: accepted is a converted model outside the engine, after "
            "load_state_dict of the engine's consolidated weights (save_16bit_model with "
            "stage3_gather_16bit_weights_on_model_save), or inside deepspeed.zero."
            "GatheredParameters"
        )
