"""Division of a resume: values from the checkpoint, hyperparameters from the configuration.

Weights, masters and moments come from the checkpoint, matched by parameter. The hyperparameters of
the parameter groups (learning rate, its scale, betas, eps, weight decay) come from the run's own
settings: torch and DeepSpeed would restore those that were saved, and a resume with a changed
setting would train with the old value. Settings may also move parameters between groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import nn

# As torch types them: parameters and hyperparameters of a group, tensors of a parameter's state.
Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]


class HasGroups(Protocol):
    """An optimizer of torch or DeepSpeed."""

    @property
    def param_groups(self) -> list[Group]: ...


class OtherParameters(UserError):
    """A checkpoint of a model with other parameters."""


def hyperparameters(optimizer: HasGroups) -> list[Group]:
    """Everything but the parameters, for each parameter group; take it before loading."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def set_hyperparameters(optimizer: HasGroups, wanted: Sequence[Group]) -> None:
    """Restores the values of `hyperparameters` in the groups, which loading has overwritten."""
    for group, values in zip(optimizer.param_groups, wanted, strict=True):
        for name in group.keys() - values.keys() - {"params"}:
            del group[name]
        group.update(values)


def require_same_parameters(
    saved: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Compares names and shapes of the parameters in a checkpoint with the model's.

    Raises:
        OtherParameters: they differ; the message names the first ones.
    """
    different = [
        f"{name} ({_shape(saved, name)} there, {_shape(own, name)} here)"
        for name in [*saved, *(name for name in own if name not in saved)]
        if name not in saved or name not in own or tuple(saved[name]) != tuple(own[name])
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise OtherParameters(
            f"{path} is of a model with other parameters: {', '.join(different[:3])}{more}; "
            "settings that add, remove or resize parameters cannot change on a resume, choose "
            "another --run.name for them"
        )


def _shape(shapes: Mapping[str, Sequence[int]], name: str) -> str:
    return "x".join(map(str, shapes[name])) if name in shapes else "absent"


def state_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, State]:
    """The optimizer's state of each parameter under the parameter's name."""
    names = {id(p): name for name, p in module.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items()}


def load_state_by_name(
    optimizer: torch.optim.Optimizer, module: nn.Module, saved: Mapping[str, State]
) -> None:
    """Fills the state of each parameter from what `state_by_name` gave; the groups stay."""
    names = {id(p): name for name, p in module.named_parameters()}
    own = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state = {k: saved[name] for k, name in enumerate(order) if name in saved}
    optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})


class NumberedState(TypedDict):
    """The state dict of an optimizer of torch."""

    state: dict[int, State]
    param_groups: list[Group]


def numbered_state_by_name(
    saved: NumberedState, optimizer: torch.optim.Optimizer, module: nn.Module, path: Path
) -> dict[str, State]:
    """The same from a state dict that numbers the parameters, as checkpoints up to 0.1 did.

    Raises:
        UserError: the groups are of other sizes, so that the numbers mean other parameters.
    """
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if [len(group["params"]) for group in saved["param_groups"]] != sizes:
        raise UserError(
            f"{path} numbers its parameters, and optim.weight_decay or optim.embedding_lr has "
            "moved them to other groups since: resume once with the former values, or choose "
            "another --run.name"
        )
    names = {id(p): name for name, p in module.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    return {order[number]: state for number, state in saved["state"].items()}
