"""The training command: a sentence encoder with DALR, on as many processes as were started.

accelerate launch -m dalr_scale.train [--config RECIPE|FILE|RUN] [--section.key=value ...]
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from dalr_scale.config.arguments import configuration
from dalr_scale.process import end_process, run_command, set_passive_omp_wait

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the arguments say; returns the exit status of this rank."""
    config = configuration(argv)
    # torch and DeepSpeed are imported only for arguments that are known to be right
    set_passive_omp_wait()
    from dalr_scale.training.session import train

    return train(config)


if __name__ == "__main__":
    status = run_command(main, None)
    if "torch" in sys.modules:
        end_process(status)
    raise SystemExit(status)
