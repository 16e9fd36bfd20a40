"""What the fork server of ``launching.py`` does once, so that no training process does it again.

Imports, and what libraries find out about the machine and their own models at first use.
"""

from __future__ import annotations

import gc
import importlib

MODULES = (
    "accelerate",
    "dalr_scale.training.session",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    # DeepSpeed imports it to look at an optimizer's type, and it brings all of torch.compile
    "deepspeed.runtime.zero.muon.original_muon",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "multiprocessing.popen_fork",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
    "transformers.models.roberta.modeling_roberta",
)


def warm() -> None:
    """Fills the caches; a library that has other ones by now just starts slower."""
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    import deepspeed.ops
    from transformers import conversion_mapping

    getattr(deepspeed.ops, "__compatible_ops__", None)  # its first use runs a compiler
    conversion_mapping.get_checkpoint_conversion_mapping("bert")
    # forked processes collect what they make, and do not write to the pages of all this
    gc.collect()
    gc.freeze()


warm()
