"""SparseLoCo: workers train apart for H steps, then exchange sparse pseudo-gradients of two bits.

Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo" (arXiv 2508.15706). Each of
R workers takes H steps of an inner optimizer of its own, from shared parameters x to x_r. Then

    D_r = x - x_r,                  e_r <- b e_r + D_r
    S_r = Q(top_k(e_r)),            e_r <- e_r - S_r          (error feedback, which is local)
    x   <- x - outer_lr mean_r S_r

and all go on from x. Only S_r travels: of each chunk of `chunk` entries the `density` largest, with
values of two bits (`messages`). Moments of the inner optimizer stay with their worker.

Memory of a worker, besides the inner optimizer's: x and e_r, an fp32 entry each for each parameter
entry (fp64 for fp64). A message has `message_bytes` bytes for all H steps.

The paper's quantiser and its rates were not at hand: Q is ours, and so are the defaults.

Where an outer optimizer belongs: around an inner one, `SparseLoCo(build(name, model), ...)`, in the
place of which it is called. It is no method of the table, because it changes no update rule and
takes any `torch.optim.Optimizer`; nor a hook of DistributedDataParallel, which averages gradients
at every step. Models must be whole on each worker: wrapped or sharded ones are refused, and so are
methods that change frozen weights (ReLoRA, SwitchLoRA, SST, LoQT), which would not be exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from lowrank.cuda.noise import mix, signed_seed

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.in_backward.refusals import _wrappers
from ..engine.sharding import is_dtensor
from ..layers.frozen import FrozenMatrix
from ..weights.quantized import QuantizedWeight
from .messages import BITS, LARGEST_CHUNK, Format

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer

#: Bytes by which workers compare step, message and finiteness first.
HEADER_BYTES = 24


class SparseLoCo:
    """An inner optimizer, whose parameters workers exchange every `inner_steps` steps.

    Call it in the optimizer's place: `step()`, `zero_grad()`, `state_dict()`. Learning rate
    schedules are the inner optimizer's (`SparseLoCo.inner`). All workers must take the same number
    of steps; between exchanges their parameters differ, so evaluate and save models after one
    (`exchanged` is True then).

    Attributes:
        inner: the inner optimizer.
        steps: steps taken.
    """

    def __init__(
        self,
        inner: Optimizer,
        *,
        inner_steps: int = 30,
        outer_lr: float = 1.0,
        density: float = 1 / 64,
        chunk: int = 4096,
        error_decay: float = 0.95,
        bits: int = 2,
        process_group: ProcessGroup | None = None,
        timeout: float = 600.0,
    ) -> None:
        """Compares the workers' parameters; all call it.

        Args:
            inner: of this worker, with all parameters that are trained.
            inner_steps: H, at least 1.
            outer_lr: at least 0.
            density: share of entries that is sent, in (0, 1].
            chunk: entries of a chunk, at most 32768.
            error_decay: b, in [0, 1].
            bits: of a value, 2 or 32.
            process_group: the workers; None is all processes.
            timeout: seconds that an exchange waits for the slowest worker (gloo; other backends
                have that of the process group).

        Raises:
            ValueError: an option is out of range, the parameters are wrapped, sharded or quantised,
                or differ between workers, or the inner optimizer changes frozen weights.
            RuntimeError: `torch.distributed` is not initialised.
        """
        checks.integer("inner_steps", inner_steps, low=1)
        checks.number("outer_lr", outer_lr, low=0.0)
        checks.number("density", density, low=0.0, high=1.0, low_open=True)
        checks.integer("chunk", chunk, low=1)
        if chunk > LARGEST_CHUNK:
            raise ValueError(f"chunk={chunk!r}: accepted is at most {LARGEST_CHUNK}")
        checks.number("error_decay", error_decay, low=0.0, high=1.0)
        checks.choice("bits", bits, BITS)
        checks.number("timeout", timeout, low=0.0, low_open=True)
        if not (distributed.is_available() and distributed.is_initialized()):
            raise RuntimeError(
                "SparseLoCo before torch.distributed.init_process_group(): on one process it would "
                "only lose updates; accepted is the inner optimizer itself"
            )
        self.inner, self.steps = inner, 0
        self.inner_steps, self.outer_lr, self.error_decay = inner_steps, outer_lr, error_decay
        self._group, self._timeout = process_group, timeout
        self._world = distributed.get_world_size(process_group)
        self._rank = distributed.get_rank(process_group)
        self._params = self._present()
        self._check_params()
        self._formats = [Format.of(p.numel(), density, chunk, bits) for p in self._params]
        self._shared = [p.detach().to(wide_dtype(p), copy=True) for p in self._params]
        self._errors = [torch.zeros_like(own) for own in self._shared]
        self._compare("parameters", self._fingerprint())

    # The loop

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @property
    def exchanged(self) -> bool:
        """Whether no step was taken since the last exchange, so that all workers are equal."""
        return self.steps % self.inner_steps == 0

    @property
    def message_bytes(self) -> int:
        """Bytes that this worker hands to collectives in an exchange."""
        return HEADER_BYTES + sum(own.message_bytes for own in self._formats)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The inner optimizer's."""
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes an inner step, and after each `inner_steps` of them an exchange.

        Raises:
            ValueError: the inner optimizer's parameters are others than at construction.
            RuntimeError: a worker is missing, at another step, or has parameters that are not
                finite; on all workers that came, whose parameters are those before the exchange.
        """
        now = self._present()
        if len(now) != len(self._params) or any(
            own is not other for own, other in zip(now, self._params, strict=True)
        ):
            raise ValueError(
                "the inner optimizer's parameters have changed since SparseLoCo was made: accepted "
                "is a new SparseLoCo on all workers"
            )
        if not self.steps:
            self._refuse_wrappers()
        loss = self.inner.step() if closure is None else self.inner.step(closure)
        self.steps += 1
        if self.exchanged:
            self._exchange()
        return loss

    @torch.no_grad()
    def _exchange(self) -> None:
        # Errors are replaced only once all workers are known to be here.
        errors = [
            error * self.error_decay + (shared - param.detach())
            for error, shared, param in zip(self._errors, self._shared, self._params, strict=True)
        ]
        finite = all(bool(error.isfinite().all()) for error in errors)
        numbers = [self.steps, self._checksum(), int(finite)]
        self._compare("steps and options", numbers, finite=True)
        pairs = list(zip(self._formats, errors, strict=True))
        message = torch.cat([own.encode(error) for own, error in pairs])
        messages = message.new_empty(self._world, len(message))
        distributed.all_gather_into_tensor(messages.view(-1), message, group=self._group)
        sizes = [own.message_bytes for own in self._formats]
        split = [whole.split(sizes) for whole in messages]
        for position, (own, error) in enumerate(pairs):
            mean = torch.zeros(own.entries, dtype=error.dtype, device=error.device)
            for rank in range(self._world):  # one order, so that workers are equal to the bit
                sent = own.decode(split[rank][position], error.dtype)
                mean += sent
                if rank == self._rank:
                    error.sub_(sent.view_as(error))
            shared = self._shared[position]
            shared.sub_(mean.view_as(shared), alpha=self.outer_lr / self._world)
            self._params[position].copy_(shared)
        self._errors = errors

    # Checks

    def _present(self) -> list[Tensor]:
        return [param for group in self.inner.param_groups for param in group["params"]]

    def _check_params(self) -> None:
        for param in self._params:
            if is_dtensor(param) or hasattr(param, "ds_id") or isinstance(param, QuantizedWeight):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} is sharded or quantised: accepted "
                    "are whole, dense models on each worker"
                )
        for link in getattr(self.inner, "_links", ()):
            if any(
                param is not None for param in map(link.layer._parameters.get, link.layer.FROZEN)
            ) or any(isinstance(module, FrozenMatrix) for module in link.layer.modules()):
                raise ValueError(
                    f"SparseLoCo with {type(self.inner).__name__}, whose events change frozen "
                    "weights on each worker alone: accepted are methods that leave layers as they "
                    "are, or train all of them (sltrain_adamw, low_rank_adamw, dlrt_adamw)"
                )
        self._refuse_wrappers()

    def _refuse_wrappers(self) -> None:
        own = set(map(id, self._params))
        for found in _wrappers():
            params = [] if isinstance(found, torch.amp.GradScaler) else found.parameters()
            if any(id(param) in own for param in params):
                raise ValueError(
                    f"SparseLoCo with {type(found).__name__}, which averages gradients at every "
                    "step, so that workers would not train apart: accepted is the model itself"
                )

    def _fingerprint(self) -> list[int]:
        """Numbers that differ where parameters do."""
        sums = torch.stack(
            [torch.stack([own.double().sum(), own.double().square().sum()]) for own in self._shared]
        )
        weights = torch.arange(1, sums.numel() + 1, dtype=torch.float64, device=sums.device)
        folded = (sums.flatten() * weights).cpu()
        return [len(self._params), *folded.sum().view(1).view(torch.int64).tolist(), 0]

    def _checksum(self) -> int:
        """A number that differs where options of the exchange do; the inner optimizer's may."""
        rates = [self.inner_steps, float(self.outer_lr), float(self.error_decay)]
        return signed_seed(mix(0, repr((self._formats, rates))))

    def _compare(self, what: str, numbers: list[int], *, finite: bool = False) -> None:
        """Raises on all workers if three numbers differ; the third is whether it's finite."""
        device = self._params[0].device
        if distributed.get_backend(self._group) == "gloo":
            try:
                distributed.monitored_barrier(
                    self._group, timeout=timedelta(seconds=self._timeout), wait_all_ranks=True
                )
            except RuntimeError as error:
                raise RuntimeError(
                    f"SparseLoCo: not all {self._world} workers came to an exchange (step "
                    f"{self.steps} here) within {self._timeout:g} s; each must take the same steps "
                    f"({error})"
                ) from error
        own = torch.tensor(numbers, dtype=torch.int64, device=device)
        found = own.new_empty(self._world, len(own))
        distributed.all_gather_into_tensor(found.view(-1), own, group=self._group)
        table = found.tolist()
        if any(row[:2] != table[0][:2] for row in table):
            said = [row[0] for row in table] if finite else "differ"
            raise (RuntimeError if finite else ValueError)(
                f"SparseLoCo: {what} of the workers: {said}; accepted are equal models "
                "(torch.manual_seed with one seed, or one checkpoint), options and numbers of steps"
            )
        bad = [rank for rank, row in enumerate(table) if finite and not row[2]]
        if bad:
            raise RuntimeError(
                f"SparseLoCo: parameters of workers {bad} are not finite at step {self.steps}; "
                "accepted is to go on from a checkpoint"
            )

    # Saving and loading

    def state_dict(self) -> dict[str, Any]:
        """This worker's state: that of the inner optimizer, x, e_r and the step.

        Each worker saves its own, with its model's parameters, which differ between exchanges.
        """
        return {
            "inner": self.inner.state_dict(),
            "steps": self.steps,
            "worker": [self._rank, self._world],
            "shared": [own.clone() for own in self._shared],
            "errors": [own.clone() for own in self._errors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a `state_dict()` of the same worker.

        Raises:
            ValueError: it is another worker's, or of other parameters; nothing is changed then.
        """
        if state["worker"] != [self._rank, self._world]:
            rank, world = state["worker"]
            raise ValueError(
                f"the state is of worker {rank} of {world}, and this is {self._rank} of "
                f"{self._world}: accepted is each worker's own"
            )
        for key, own in (("shared", self._shared), ("errors", self._errors)):
            shapes = [list(value.shape) for value in state[key]]
            if shapes != [list(value.shape) for value in own]:
                raise ValueError(
                    f"the state's {key} have other shapes than the {len(own)} parameters here: "
                    "accepted is a state of the same model"
                )
        self.inner.load_state_dict(state["inner"])
        self._params = self._present()
        self.steps = int(state["steps"])
        for key, own in (("shared", self._shared), ("errors", self._errors)):
            for target, value in zip(own, state[key], strict=True):
                target.copy_(value)
