"""Image-text retrieval: recall at k in both directions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

_CHUNK = 1024  # rows of the similarity matrix held at once


def recall_at_k(
    text_embeddings: Tensor,
    image_embeddings: Tensor,
    text_to_image: Sequence[int] | Tensor,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall at k by cosine similarity.

    Args:
        text_embeddings: [n, d], any scale.
        image_embeddings: [m, d], any scale.
        text_to_image: [n] row of the image each text belongs to; an image may have several texts.
        ks: cut-offs.

    Returns:
        `text_to_image_r{k}`: share of texts whose image is among the k nearest images, and
        `image_to_text_r{k}`: share of images with at least one of their texts among the k nearest
        texts (images without a text are left out). Equal similarities count against the model:
        an item tied with the right one ranks before it, so a collapsed encoder scores nothing.

    Raises:
        ValueError: shapes or image rows that do not fit, or embeddings that are not finite.
    """
    owner = torch.as_tensor(text_to_image, dtype=torch.long)
    texts, images = text_embeddings.float(), image_embeddings.float()
    if texts.ndim != 2 or images.ndim != 2 or texts.shape[1] != images.shape[1]:
        raise ValueError(f"widths differ: texts {tuple(texts.shape)}, images {tuple(images.shape)}")
    if len(owner) != len(texts) or len(texts) == 0:
        raise ValueError(f"{len(texts)} texts, but {len(owner)} of them have an image row")
    if int(owner.min()) < 0 or int(owner.max()) >= len(images):
        raise ValueError(f"text_to_image points outside the {len(images)} images")
    if not bool(texts.isfinite().all() and images.isfinite().all()):
        raise ValueError("embeddings hold values that are not finite")
    texts, images = normalize(texts, dim=1), normalize(images, dim=1)
    columns = torch.arange(len(images))
    to_image = _best_rank(texts, images, owner[:, None] == columns[None])
    to_text = _best_rank(images, texts, columns[:, None] == owner[None])
    used = torch.bincount(owner, minlength=len(images)) > 0
    return {f"text_to_image_r{k}": float((to_image < k).double().mean()) for k in ks} | {
        f"image_to_text_r{k}": float((to_text[used] < k).double().mean()) for k in ks
    }


def _best_rank(queries: Tensor, keys: Tensor, right: Tensor) -> Tensor:
    """Number of wrong keys at least as near as the nearest right one; [n] int64.

    `right` [n, m] marks the right keys of each query.
    """
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        mine = right[start : start + _CHUNK]
        similarity = queries[start : start + _CHUNK] @ keys.T
        best = similarity.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        ranks.append(((similarity >= best) & ~mine).sum(1))
    return torch.cat(ranks)
