"""Several optimizers as one, which shares their parameter groups and state."""

import inspect
from collections.abc import Iterator, MutableMapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Joint(Optimizer):
    """An optimizer over others, the bases: `param_groups` and `state` are theirs, so that learning-rate
    schedulers, `GradScaler` and the like drive them, and `state_dict` is one optimizer's.

    Args:
        bases: each for parameters of its own.
        defaults: of parameter groups, beside those of the bases.

    Raises:
        TypeError, ValueError: for a base that cannot be one: it needs a closure, wraps another optimizer or
            maximizes.
    """

    _is_made = False

    def __init__(self, bases: Sequence[Optimizer], defaults: dict[str, Any]) -> None:
        self.bases = list(bases)
        _check(self.bases)
        for base in reversed(self.bases):
            defaults = {**defaults, **base.defaults}
        super().__init__(self.param_groups, defaults)
        self._is_made = True

    @property
    def base(self) -> Optimizer:
        """The base optimizer, where there is one; else raises AttributeError."""
        if len(self.bases) > 1:
            raise AttributeError("there are several base optimizers: choose from .bases")
        return self.bases[0]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The bases'."""
        if len(self.bases) == 1:
            return self.bases[0].param_groups
        return [group for base in self.bases for group in base.param_groups]

    @param_groups.setter
    def param_groups(self, value: Any) -> None:
        """Those of the base, where there is one. What `Optimizer.__init__` assigns does not replace them."""
        if self._is_made:
            self.base.param_groups = value

    @property
    def state(self) -> Any:
        """The bases'."""
        return self.bases[0].state if len(self.bases) == 1 else _States(self.bases)

    @state.setter
    def state(self, value: Any) -> None:
        """As for `param_groups`."""
        if self._is_made:
            self.base.state = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not any(param_group is group for group in self.param_groups):  # as Optimizer.__init__ lists them
            self.base.add_param_group(param_group)
        param_group.setdefault("rst", {})  # torch.distributed.checkpoint loads what the groups have already

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None, whatever `set_to_none` says."""
        for group in self.param_groups:  # not by the bases' zero_grad, of which some take no argument
            for p in group["params"]:
                p.grad = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the `step` that a learning-rate scheduler puts here, which would drive the original."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"] if p.requires_grad)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters() if p.grad is not None]

    def train(self) -> None:
        """Pass on to a base that has it, as schedule-free optimizers do."""
        for base in self.bases:
            getattr(base, "train", lambda: None)()

    def eval(self) -> None:
        """As `train`."""
        for base in self.bases:
            getattr(base, "eval", lambda: None)()

    def extra_state(self) -> dict[str, Any]:
        """What `state_dict` holds beside the bases' states."""
        return {}

    def load_extra_state(self, saved: dict[str, Any]) -> None:
        """Take up what `extra_state` gave."""

    def state_dict(self) -> dict[str, Any]:
        """The bases' states as one optimizer's. Each parameter group has `extra_state` as its entry "rst",
        which torch.distributed.checkpoint saves, too."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0  # the number of a base's first parameter
        for base in self.bases:
            part = base.state_dict()
            # Some bases, MADGRAD for one, have other keys, too.
            numbered = {i + first if isinstance(i, int) else i: value for i, value in part["state"].items()}
            groups = [
                {**group, "params": [i + first for i in group["params"]], "rst": self.extra_state()}
                for group in part["param_groups"]
            ]
            first += sum(len(group["params"]) for group in groups)
            numbered, groups = state["state"] | numbered, state["param_groups"] + groups
            state |= {**part, "state": numbered, "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError where the state is not such a one, or has other parameter groups."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups = [dict(group) for group in state_dict["param_groups"]]
        extra: list[Any] = [group.get("rst") for group in groups]
        if not all(extra):
            raise ValueError("this state_dict has no RST counters; load a base optimizer's into `.base`")
        if len(groups) != len(self.param_groups):
            raise ValueError(f"the state has {len(groups)} parameter groups, not {len(self.param_groups)}")
        for base in self.bases:
            part, groups = groups[: len(base.param_groups)], groups[len(base.param_groups) :]
            numbers = {i for group in part for i in group["params"]}
            state = {i: v for i, v in state_dict["state"].items() if i in numbers or not isinstance(i, int)}
            part = [{**group, "rst": {}} for group in part]
            base.load_state_dict({**state_dict, "state": state, "param_groups": part})
        self.load_extra_state(extra[0])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers as one; each parameter's is in the optimizer that has it."""

    def __init__(self, bases: Sequence[Optimizer]) -> None:
        self._bases = bases

    def _of(self, p: Tensor) -> Any:
        for base in self._bases:
            if any(p is each for group in base.param_groups for each in group["params"]):
                return base.state
        raise KeyError(p)

    def __getitem__(self, p: Tensor) -> Any:
        return self._of(p)[p]

    def __setitem__(self, p: Tensor, value: Any) -> None:
        self._of(p)[p] = value

    def __delitem__(self, p: Tensor) -> None:
        del self._of(p)[p]

    def __contains__(self, p: object) -> bool:  # to ask for it would make one
        return any(p in base.state for base in self._bases)

    def __iter__(self) -> Iterator[Tensor]:
        return chain.from_iterable(base.state for base in self._bases)

    def __len__(self) -> int:
        return sum(len(base.state) for base in self._bases)


def _check(bases: list[Any]) -> None:
    for base in bases:
        name = type(base).__name__
        if not isinstance(base, Optimizer):
            raise TypeError(
                "base must be a torch.optim.Optimizer such as SGD(model.parameters(), lr=0.1), or a list of "
                f"them, got a {name}"
            )
        if any(isinstance(value, Optimizer) for value in vars(base).values()) or isinstance(base, Joint):
            raise TypeError(
                f"{name} wraps an optimizer: give RST the inner one (Lookahead and the like go around RST; "
                "fully_shard takes ZeroRedundancyOptimizer's place)"
            )
        closure = inspect.signature(base.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise TypeError(
                f"{name} calls a closure of its own, so it cannot be RST's base: use SGD or AdamW, say"
            )
        if any(group.get("maximize") for group in base.param_groups):
            raise ValueError("SAM minimizes: negate the loss instead of setting maximize=True")
    numbers = [id(p) for base in bases for group in base.param_groups for p in group["params"]]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a parameter is in two of the bases")
    if not bases:
        raise ValueError("RST needs a base optimizer")
