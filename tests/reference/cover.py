"""A few of the random rows that together show every value of what matters most."""

from __future__ import annotations

from reference.draw import Row, draw

CANDIDATES = 170


def cover() -> list[int]:
    """Numbers of rows, greedily, until no candidate adds a value."""
    rows = [row for row in map(draw, range(CANDIDATES)) if cheap(row)]
    left = set().union(*map(facts, rows))
    chosen = []
    while left:
        best = max(rows, key=lambda row: (len(facts(row) & left) / cost(row), -row.number))
        chosen.append(best.number)
        left -= facts(best)
    return sorted(chosen)


def cheap(row: Row) -> bool:
    return row.ranks * (1 + len(row.stops)) <= 4 or (row.ranks == 4 and not row.stops)


def cost(row: Row) -> float:
    """Processes that a row starts, and what its comparison costs anyway."""
    return 1 + row.ranks + sum(stop.ranks for stop in row.stops)


def facts(row: Row) -> set[str]:
    """What a row shows; one that must be refused shows nothing else."""
    if row.broken:
        return {f"broken {row.broken}"}
    c = row.changes
    encoder = c.get("model.encoder") or f"new {c['model.architecture']['model_type']}"
    engine = f"{c['engine.kind']} {row.precision}"
    several = "ranks" if row.ranks > 1 else "one"
    if row.precision != "bf16":
        engine += f" {c.get('engine.offload_optimizer', False)} {several}"
    facts = {
        engine,
        f"{c['objective.preset']} {several}",
        f"{encoder} {c['model.pooler']}",
        f"{row.ranks} ranks",
        f"tail {c['objective.tail']} {min(row.ranks, 2)}",
        f"{c['objective.alternation']} {'data.pair_fraction' in c}",
        f"checkpointing {c['model.activation_checkpointing']}",
        f"optimizer {c['optim.name']} embeddings {'optim.embedding_lr' in c}",
        f"weighted {'data.pair_weights' in c}",
    }
    facts |= {f"{stop.how} {'same' if stop.ranks == row.ranks else 'other'}" for stop in row.stops}
    return facts
