"""What a run says about itself: the batch arithmetic before, the table of scores after."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dalr_scale.engines.precision import resolve_precision
from dalr_scale.estimate.predict import column_traffic, parameter_traffic, plan_memory
from dalr_scale.eval.unit import UNIT, in_percent, read_scores
from dalr_scale.run.files import write_durably
from dalr_scale.training.fingerprint import package_versions
from dalr_scale.training.metrics import format_table, print_table

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from dalr_scale.config import Config
    from dalr_scale.models.dalr import DalrModel
    from dalr_scale.run.files import JsonTable
    from dalr_scale.training.build import Streams
    from dalr_scale.training.trainer import Trainer

MIB = 2**20


def arithmetic(config: Config, streams: Streams, model: DalrModel, world_size: int) -> str:
    """The numbers that a user should check before the first step."""
    plan, batch = streams.plan, config.batch
    rows = batch.global_size // world_size
    micro = batch.micro_size or rows
    text, pair = plan.batches_before(streams.total_steps)
    sizes = (plan.text_items, plan.n_text), (plan.pair_items, plan.n_pair)
    dropped = [max(items - batches * batch.global_size, 0) for items, batches in sizes]
    epochs = [f"{done / max(n, 1):.2f}" for done, (_, n) in zip((text, pair), sizes, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    table = [
        {"what": "parameters, trainable", "value": f"{parameters:,}"},
        {"what": "global batch (effective batch)", "value": f"{batch.global_size:,} rows"},
        {"what": "ranks x rows", "value": f"{world_size} x {rows}"},
        {"what": "chunks per rank", "value": f"{-(-rows // micro)} of up to {micro} rows"},
        {"what": "text items, batches per epoch", "value": f"{plan.text_items:,}, {plan.n_text:,}"},
        {"what": "pair items, batches per epoch", "value": f"{plan.pair_items:,}, {plan.n_pair:,}"},
        {"what": "rows dropped per epoch", "value": f"text {dropped[0]}, pairs {dropped[1]}"},
        {"what": "stream epochs in this run", "value": f"text {epochs[0]}, pairs {epochs[1]}"},
        {"what": "steps (text + paired)", "value": f"{streams.total_steps:,} ({text} + {pair})"},
        {
            "what": "engine, precision",
            "value": f"{config.engine.kind}, {resolve_precision(config.engine)}",
        },
        {"what": "objective", "value": config.objective.preset},
        *_several_teachers(config, model),
    ]
    return format_table(f"run {config.run.name}, {config.run_dir}", table)


def _several_teachers(config: Config, model: DalrModel) -> list[dict[str, str]]:
    """Weights of the teachers, where there are several: their order decides."""
    spec, rows = model.spec, []
    if spec.needs.text and len(spec.text_weights) > 1:
        pairs = zip(config.teachers.text, spec.text_weights, strict=True)
        value = ", ".join(f"{weight:g} {name}" for name, weight in pairs)
        rows.append({"what": "sentence teachers, weights", "value": value})
    if len(spec.token_weights) > 1:
        how = "tokens mixed" if spec.objective.g2l_mix == "features" else "losses added"
        value = ", ".join(f"{weight:g}" for weight in spec.token_weights)
        rows.append({"what": "token teachers, weights", "value": f"{value}; {how}"})
    return rows


def needs(
    config: Config, model: DalrModel, world_size: int, device: torch.device | None = None
) -> str:
    """Predicted memory of a rank on `device` (this host's), and what it sends in a step."""
    memory = plan_memory(config, model, world_size, device)
    rows = [
        {"memory of a rank": n.replace("_", " "), "MiB": v / MIB} for n, v in vars(memory).items()
    ]
    rows.append(
        {"memory of a rank": "total, activations of a chunk excluded", "MiB": memory.total / MIB}
    )
    tables = ["", format_table("predicted memory", rows)]
    if world_size > 1:
        paired = bool(config.data.pairs)
        sent = column_traffic(config, model, world_size, paired=paired)
        sent["gradients and weights"] = parameter_traffic(config, model, world_size)
        sent["total"] = sum(sent.values())
        kind = "paired" if paired else "text"
        lines = [{f"sent in a {kind} step": n, "MiB": v / MIB} for n, v in sent.items()]
        tables.append(format_table("predicted traffic of a rank", lines))
    return "\n".join(tables)


def write_result(
    config: Config, before: JsonTable, after: dict[str, float], trainer: Trainer, seconds: float
) -> None:
    """RUN/result.json: scores x 100 before and after, and where they come from.

    Args:
        before: RUN/before.json, scores x 100.
        after: fractions, as they are computed.
    """
    result = {
        "name": config.run.name,
        "preset": config.objective.preset,
        "seed": config.run.seed,
        "steps": trainer.step,
        "best_step": trainer.best_step,
        "seconds": round(seconds, 1),
        **before,
        "unit": UNIT,
        "trained": in_percent(after),
        "versions": package_versions(),
    }
    text = json.dumps(result, indent=1) + "\n"
    write_durably(config.run_dir / "result.json", text.encode())


def print_result(run_dir: Path) -> None:
    """The final table of a run, from RUN/result.json."""
    path = run_dir / "result.json"
    if not path.exists():
        return
    result = read_scores(path)
    trained, untrained = result["trained"], result.get("untrained", {})
    lexical = result.get("lexical", {})
    rows = [
        {
            "task": name,
            "word overlap": _percent(lexical.get(name)),
            "untrained": _percent(untrained.get(name)),
            "trained": _percent(score),
            "gap closed": _gap(untrained.get(name), score),
        }
        for name, score in trained.items()
    ]
    title = (
        f"{result['name']}: preset {result['preset']}, seed {result['seed']}, "
        f"{result['steps']} steps (best at {result['best_step']}), {result['seconds']:.0f} s, "
        f"{UNIT}"
    )
    if rows:
        print_table(title, rows)
    best = result["best_step"]
    if best not in (None, result["steps"]) and "text_to_image_r1" in trained:
        print(f"(recall is of step {result['steps']}: an exported encoder has no image head)")
    encoder = run_dir / ("best" if (run_dir / "best").is_dir() else "final")
    print(f"encoder: {encoder}   curves: tensorboard --logdir {run_dir}/tensorboard")


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def _gap(before: float | None, after: float) -> str:
    """Share of the distance from the untrained score to a perfect one."""
    if before is None or before >= 100:
        return "-"
    return f"{100 * (after - before) / (100 - before):.0f} %"
