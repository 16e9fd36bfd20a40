"""What launchers and libraries keep for a whole process, and a run must not take over.

``accelerate launch`` turns the user's ``default_config.yaml`` into environment variables, from
which Accelerate would start torch.compile, FSDP, another precision or another DeepSpeed file. And
Accelerate, DeepSpeed and transformers remember the engine of a first run when a second one starts
in the same process.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# these change neither what is computed nor how it is distributed
_HARMLESS = ("ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY")
# what a launcher sets by default; DeepSpeed itself is what such a launch is for
_NEUTRAL = ("", "no", "none", "false", "0", "1")
_ENABLING = (
    "ACCELERATE_DYNAMO_BACKEND",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "ACCELERATE_TORCH_DEVICE",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
)
_WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# ZeRO-3 replaces it for the whole process; its sums come in another order
_LINEAR = torch.nn.functional.linear


class Environment:
    """The variables as the launcher left them; `restore` gives them back."""

    def __init__(self) -> None:
        self._before = _own(os.environ)

    def ignore_launcher_settings(self, *, warn: bool) -> None:
        """Removes the launcher's settings: a run does what its own configuration says."""
        for name in [name for name in self._before if name.startswith(_PREFIXES)]:
            del os.environ[name]
        requested = [
            f"{name}={value}"
            for name, value in self._before.items()
            if name in _ENABLING and value.lower() not in _NEUTRAL
        ]
        if requested and warn:
            log.warning(
                "ignored from the launcher's configuration: %s; set [engine] and [optim] instead",
                ", ".join(requested),
            )

    def restore(self) -> None:
        for name in _own(os.environ):
            del os.environ[name]
        os.environ.update(self._before)


def _own(variables: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in variables.items()
        if name in _WORLD or (name.startswith(_PREFIXES) and name not in _HARMLESS)
    }


def reset_engine_state() -> None:
    """Makes Accelerate, DeepSpeed and transformers start afresh; imports none of them."""
    torch.nn.functional.linear = _LINEAR
    if accelerate := sys.modules.get("accelerate.state"):
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    if comm is not None:
        comm.cdb = None
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        for name, value in list(vars(groups).items()):
            if name.startswith("_") and name.isupper() and not isinstance(value, str):
                setattr(groups, name, {} if isinstance(value, dict) else None)
        groups.mpu = groups.mesh_device = None
    if integration := sys.modules.get("transformers.integrations.deepspeed"):
        integration.unset_hf_deepspeed_config()
