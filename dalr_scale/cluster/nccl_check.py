"""One NCCL all-reduce over the nodes of a job, before training depends on it."""

from __future__ import annotations

from datetime import timedelta


def all_reduce(head: str, port: int, nodes: int, rank: int, seconds: float = 60.0) -> str | None:
    """Touches every GPU of this node, then sums over the nodes' first ones.

    Returns:
        What went wrong, or None.
    """
    import torch
    import torch.distributed as dist

    try:
        for number in range(torch.cuda.device_count()):
            row = torch.ones(1024, device=f"cuda:{number}")
            if float(row @ row) != 1024.0:
                return f"GPU {number} does not multiply right"
        torch.cuda.set_device(0)
        dist.init_process_group(
            "nccl",
            init_method=f"tcp://{head}:{port}",
            world_size=nodes,
            rank=rank,
            timeout=timedelta(seconds=seconds),
        )
        try:
            row = torch.ones(1 << 20, device="cuda:0")
            dist.all_reduce(row)
            if not bool((row == nodes).all()):
                return f"NCCL all-reduce over {nodes} nodes gives a wrong sum"
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:
        return f"NCCL all-reduce over {nodes} nodes failed: {str(error).splitlines()[0]}"
    return None
