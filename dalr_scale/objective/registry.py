"""The terms of the objective, and what a configuration makes of them."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from dalr_scale.config.limits import WEIGHT
from dalr_scale.errors import UserError
from dalr_scale.objective.cma import CrossAlignment
from dalr_scale.objective.con import Contrastive
from dalr_scale.objective.cons import Consistency
from dalr_scale.objective.g2l import GlobalToLocal
from dalr_scale.objective.ima import IntraAlignment
from dalr_scale.objective.rank import Ranking
from dalr_scale.objective.term import Needs, Term
from dalr_scale.objective.xce import CaptionBranch, ImageBranch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dalr_scale.config import ObjectiveConfig

# The order in which the terms are added up and logged.
TERMS: list[Term] = [
    Contrastive(),
    IntraAlignment(),
    Ranking(),
    Consistency(),
    CrossAlignment(),
    ImageBranch(),
    CaptionBranch(),
    GlobalToLocal(),
]


def active_terms(objective: ObjectiveConfig) -> list[Term]:
    """The terms that have a weight.

    Raises:
        UserError: ``objective.terms`` names no term of `TERMS`, or gives a weight out of range.
    """
    _check_added(objective)
    return [term for term in TERMS if term.active(objective)]


def needs_of(objective: ObjectiveConfig) -> Needs:
    """What the active terms need."""
    needs = Needs()
    for term in active_terms(objective):
        needs |= term.needs(objective)
    return needs


def _check_added(objective: ObjectiveConfig) -> None:
    names = [term.name for term in TERMS if term.weight_keys is None]
    for name, weight in objective.terms.items():
        if name not in names:
            raise UserError(f"unknown term '{name}' in objective.terms{_hint(name, names)}")
        if weight not in WEIGHT:
            raise UserError(
                f"objective.terms.{name} = {weight} is out of range: it must be {WEIGHT}"
            )


def _hint(name: str, names: Sequence[str]) -> str:
    builtin = next((term for term in TERMS if term.name == name), None)
    if builtin is not None:
        keys = " and ".join(f"objective.{key}" for key in builtin.weight_keys or ())
        return f": the weight of {builtin.title} is {keys or 'always 1'}"
    if not names:
        return ": no term without a key of its own is in dalr_scale/objective/registry.py"
    return f"; did you mean '{difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]}'?"


def keys_without_effect(objective: ObjectiveConfig) -> dict[str, str]:
    """Keys of ``[objective]`` that change nothing, whatever the data: key -> reason."""
    return _unread(objective) | _weights_without_effect(objective)


def _unread(objective: ObjectiveConfig) -> dict[str, str]:
    readers: dict[str, list[tuple[Term, str]]] = {}
    for term in TERMS:
        for key, reason in term.settings(objective).items():
            readers.setdefault(key, []).append((term, reason))
    found: dict[str, str] = {}
    for key, entries in readers.items():
        reasons = [reason for term, reason in entries if term.active(objective)]
        if not reasons:
            titles = [term.title for term, _ in entries]
            found[key] = f"{_listed(titles)} {'has' if len(titles) == 1 else 'have'} no weight"
        elif all(reasons):
            found[key] = reasons[0]
    return found


def _weights_without_effect(objective: ObjectiveConfig) -> dict[str, str]:
    """A weight below a group of weight 0, and the weight of a group without terms."""
    others: dict[str, list[list[str]]] = {}
    for term in TERMS:
        keys = term.weight_keys or ()
        for key in keys:
            others.setdefault(key, []).append([k for k in keys if k != key])
    found: dict[str, str] = {}
    for key, lists in others.items():
        zeros = [[k for k in keys if not getattr(objective, k) > 0] for keys in lists]
        if all(zeros):
            found[key] = f"{_listed(sorted({k for keys in zeros for k in keys}))} = 0"
    return found


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
