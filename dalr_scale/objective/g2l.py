"""L_g2l: global-to-local matching of a sentence vector with the teachers' tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dalr_kernels as kernels
import torch
from torch import Tensor
from typing_extensions import override

from dalr_scale.errors import UserError
from dalr_scale.objective.term import READ, BatchTerm, Needs, mask_ids
from dalr_scale.objective.text_teachers import widened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dalr_scale.config.schema import GlobalToLocalConfig
    from dalr_scale.objective.views import LossBatch


class GlobalToLocal(BatchTerm):
    """The loss of the mixed tokens, or the weighted sum over the token teachers.

    Tokens stay on their rank: all rows are scored against this rank's tokens, and the ranks'
    partial results are merged.
    """

    name = "g2l"
    title = "L_g2l"
    batches = "paired"
    weight_keys = ("intra_weight", "g2l_weight")

    @override
    def loss(self, objective: GlobalToLocalConfig, batch: LossBatch) -> Tensor:
        """The mean over this rank's rows."""
        rows, cols = batch.rows, batch.cols
        ids = mask_ids(objective, cols, rows)
        tokens, masks, weights = rows.tokens, rows.token_masks, batch.token_weights
        if objective.g2l_mix == "features":
            tokens, masks, weights = [mix_tokens(tokens, weights)], masks[:1], [1.0]
        options: dict[str, Any] = {
            "temperature": objective.temperature,
            "norm": objective.g2l_norm,
            "unit_rows": objective.g2l_unit_rows,
        }
        losses: list[Tensor] = []
        for k, (weight, _) in enumerate(zip(weights, tokens, strict=True)):
            partial = kernels.token_negatives(
                cols.z1_tokens[k], tokens[k], masks[k], first_own=batch.offset, **ids, **options
            )
            merged = batch.ranks.log_sum_exp(*partial)
            loss = kernels.own_token_loss(
                rows.z1_tokens[k], tokens[k], masks[k], *merged, **options
            )
            losses.append(weight * loss)
        return torch.stack(losses).sum()

    @override
    def needs(self, objective: GlobalToLocalConfig) -> Needs:
        return Needs(tokens=True)

    @override
    def settings(self, objective: GlobalToLocalConfig) -> Mapping[str, str]:
        return dict.fromkeys(
            ("temperature", "same_image", "token_projection", "g2l_norm", "g2l_unit_rows",
             "g2l_mix", "teacher_tokenizer"),
            READ,
        )  # fmt: skip


def mix_tokens(tokens: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The tokens l = sum of alpha_k l_k, for teachers of one width that read the same tokens.

    Raises:
        UserError: tokens of different shapes.
    """
    if len({t.shape for t in tokens}) > 1:
        shapes = [tuple(t.shape) for t in tokens]
        raise UserError(
            f"token teachers of shapes {shapes} cannot be mixed; set --objective.g2l_mix=losses"
        )
    return torch.stack([w * widened(t) for w, t in zip(weights, tokens, strict=True)]).sum(0)
