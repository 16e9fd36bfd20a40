"""How the process of a command starts and ends."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from dalr_scale.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def set_passive_omp_wait() -> None:
    """Lets idle OpenMP threads sleep; call it before torch is imported.

    By default they spin, and on a host whose cores are shared with anything else two spinning
    threads made a training step up to ten times slower than one thread.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None) -> int:
    """Runs a command's ``main``; errors caused by user input become one line."""
    try:
        return main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def end_process(status: int) -> NoReturn:
    """Ends this process at once, with everything written out.

    The interpreter's own exit runs into background threads that the collectives leave behind: a
    rank that had finished was seen to abort there ("terminate called without an active
    exception"), and a launcher would call the whole run failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
