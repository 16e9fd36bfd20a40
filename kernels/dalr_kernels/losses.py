"""Public losses of DALR (arXiv 2506.21096) on local rows and global columns.

All of them share these conventions. Rows are this rank's ``[R, D]``, columns the gathered
``[N, D]``; the positive of row i is column ``i + col_offset``. Inputs may be float16, bfloat16,
float32 (computed in float32) or float64 (computed in float64), also inside autocast, and are
normalized here. The result is the mean over the R local rows, a scalar: averaging the gradients
over ranks then gives the gradient of the mean over the global batch, provided the gather of the
columns sums gradients in its backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalr_kernels import reference
from dalr_kernels import validation as checks
from dalr_kernels.eager.chunked import workspace_of
from dalr_kernels.eager.global_to_local import TokenArguments, stream_global_to_local
from dalr_kernels.row_losses import How, weighted_mean
from dalr_kernels.similarity import Similarity, unit
from dalr_kernels.terms import AlignmentKL, InfoNCE, ListMLE, ListNet, Term

# ListMLE sorts whole rows and global-to-local streams over tokens: plain torch serves both.
WITHOUT_KERNEL = ("auto", "torch", "reference")


def info_nce(
    rows: Tensor,
    cols: Tensor,
    *,
    temperature: float,
    margin: float = 0.0,
    soft_labels: Similarity | None = None,
    clamp_soft_labels: bool = False,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    mask_above: tuple[Similarity, float] | None = None,
    col_offset: int = 0,
    impl: str = "auto",
    mode: str = "auto",
    deterministic: bool = True,
    check_finite: bool | None = None,
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Contrastive loss with angular margin: L_con and L_xce of DALR, L_v and L_t of KDMCSE.

    ``mean_i logsumexp_j A_ij - A_ii`` with ``A = cos(theta - margin (1 - s)) / temperature`` for
    negatives whose angle exceeds the margin and ``cos(theta) / temperature`` elsewhere.

    Args:
        rows: Local rows ``[R, D]``, differentiable.
        cols: Global columns ``[N, D]``, differentiable.
        temperature: Divides the similarities, positive.
        margin: Radians; 0 gives the plain loss of SimCSE and MCSE.
        soft_labels: Constant s ``[R, N]``; a negative counted as similar gets less margin.
        clamp_soft_labels: Clamp s to [0, 1]; without it a negative s raises the margin.
        row_ids: Image ids ``[R]``; negatives with the id of the row (ids >= 0) are left out.
        col_ids: Image ids ``[N]``, given together with `row_ids`.
        mask_above: ``(similarity, threshold)``; negatives above the threshold are left out.
        col_offset: Column of the positive of row 0.
        impl: "triton" (fused kernels), "torch" (row chunks, linear memory), "reference" (dense)
            or "auto"; this and all further options as in `row_losses`.
        mode: "workspace", "stream" or "auto", of "triton".
        deterministic: Same bits for the same inputs, shapes and device.
        check_finite: Refuse NaN and infinity in rows and columns; None: on a CPU.
        chunk_rows: Rows per chunk; by default what fits `workspace_bytes`.
        workspace_bytes: Temporary memory; default 256 MiB, on CUDA 1 GiB.

    Returns:
        The mean over the local rows, a scalar in float32 or float64.

    Raises:
        ValueError: Shapes, types, devices or values that do not fit, named in the message.
    """
    term = InfoNCE(
        temperature=temperature,
        margin=margin,
        soft_labels=soft_labels,
        clamp_soft_labels=clamp_soft_labels,
        row_ids=row_ids,
        col_ids=col_ids,
        mask_above=mask_above,
    )
    how = How(impl, mode, deterministic, check_finite, chunk_rows, workspace_bytes)
    return _mean(rows, cols, term, col_offset, how)


def alignment_kl(
    rows: Tensor,
    cols: Tensor,
    teacher: Similarity,
    *,
    student_temperature: float = 0.45,
    teacher_temperature: float = 0.5,
    margin: float = 0.0,
    temperature: float = 1.0,
    col_offset: int = 0,
    impl: str = "auto",
    mode: str = "auto",
    deterministic: bool = True,
    check_finite: bool | None = None,
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Alignment divergence of DALR: either half of L_CMA, and L_IMA.

    ``mean_i KL(softmax(teacher_i / teacher_temperature) || softmax(A_i / student_temperature))``,
    diagonal included. `margin` and `temperature` shape the student's A as in `info_nce`; their
    defaults leave plain cosines.

    Args:
        rows: Local rows ``[R, D]``, differentiable (detach a frozen side).
        cols: Global columns ``[N, D]``, differentiable.
        teacher: Constant ``[R, N]``.
        student_temperature: Softmax temperature of the student, positive.
        teacher_temperature: Softmax temperature of the teacher, positive.
        margin: Angular margin of A in radians.
        temperature: Temperature inside A, positive.
        col_offset: Column of the positive of row 0.
        impl: See `info_nce`, also for the options below.
        mode: See `info_nce`.
        deterministic: See `info_nce`.
        check_finite: See `info_nce`.
        chunk_rows: See `info_nce`.
        workspace_bytes: See `info_nce`.

    Returns:
        The mean over the local rows, a scalar in float32 or float64.

    Raises:
        ValueError: Shapes, types, devices or values that do not fit, named in the message.
    """
    term = AlignmentKL(
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
        margin=margin,
        temperature=temperature,
        teacher=teacher,
    )
    how = How(impl, mode, deterministic, check_finite, chunk_rows, workspace_bytes)
    return _mean(rows, cols, term, col_offset, how)


def list_net(
    rows: Tensor,
    cols: Tensor,
    teacher: Similarity,
    *,
    teacher_temperature: float,
    temperature: float,
    margin: float = 0.0,
    col_offset: int = 0,
    impl: str = "auto",
    mode: str = "auto",
    deterministic: bool = True,
    check_finite: bool | None = None,
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Ranking distillation by ListNet (L_rank of DALR and RankCSE), diagonals removed.

    ``mean_i - sum_{j != i} softmax(teacher_i / teacher_temperature)_j log softmax(A_i)_j``, both
    softmaxes over j != i. A batch of one gives 0.

    Args:
        rows: Local rows ``[R, D]``, differentiable.
        cols: Global columns ``[N, D]``, differentiable.
        teacher: Constant ``[R, N]``.
        teacher_temperature: Divides the teacher, positive.
        temperature: Divides the student's similarities, positive.
        margin: Angular margin of A in radians.
        col_offset: Column of the positive of row 0.
        impl: See `info_nce`, also for the options below.
        mode: See `info_nce`.
        deterministic: See `info_nce`.
        check_finite: See `info_nce`.
        chunk_rows: See `info_nce`.
        workspace_bytes: See `info_nce`.

    Returns:
        The mean over the local rows, a scalar in float32 or float64.

    Raises:
        ValueError: Shapes, types, devices or values that do not fit, named in the message.
    """
    term = ListNet(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        margin=margin,
        teacher=teacher,
    )
    how = How(impl, mode, deterministic, check_finite, chunk_rows, workspace_bytes)
    return _mean(rows, cols, term, col_offset, how)


def list_mle(
    rows: Tensor,
    cols: Tensor,
    teacher: Similarity,
    *,
    temperature: float,
    margin: float = 0.0,
    reduction: str = "mean",
    eps: float = 0.0,
    col_offset: int = 0,
    impl: str = "auto",
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Ranking distillation by ListMLE (L_rank of DALR and RankCSE), diagonal included.

    For each row the student list y is put in the teacher's descending order, less its maximum; the
    row costs the sum over j of ``log(sum_{k>=j} exp(y_k) + eps) - y_j``. Only the order of the
    teacher matters. Teacher scores within 2^-20 (float64: 2^-40) are ties and keep column order.

    Args:
        rows: Local rows ``[R, D]``, differentiable.
        cols: Global columns ``[N, D]``, differentiable.
        teacher: Constant ``[R, N]``.
        temperature: Divides the student's similarities, positive.
        margin: Angular margin in radians.
        reduction: "mean" over the list (comparable between batch sizes) or the published "sum".
        eps: Added inside the logarithm; the published code uses 1e-7.
        col_offset: Column of the positive of row 0.
        impl: "torch" (row chunks), "reference" (dense) or "auto".
        chunk_rows: Rows per chunk of "torch".
        workspace_bytes: Temporary memory of "torch".

    Returns:
        The mean over the local rows, a scalar in float32 or float64.

    Raises:
        ValueError: Shapes, types, devices or values that do not fit, named in the message.
    """
    checks.implementation(impl, WITHOUT_KERNEL)
    term = ListMLE(
        temperature=temperature,
        margin=margin,
        reduction=reduction,
        eps=eps,
        teacher=teacher,
    )
    how = How(impl, chunk_rows=chunk_rows, workspace_bytes=workspace_bytes)
    return _mean(rows, cols, term, col_offset, how)


def global_to_local(
    rows: Tensor,
    own_tokens: Tensor,
    own_mask: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    temperature: float,
    norm: str = "token",
    unit_rows: bool = True,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    col_offset: int = 0,
    impl: str = "auto",
    chunk_rows: int | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Global-to-local loss of DALR: frozen teacher tokens against the student's sentence vector.

    ``mean_i mean_{t in i} softplus(N_i - g_iit)`` with ``g_ijt = <token_jt, row_i> / temperature``
    and ``N_i`` the log-sum-exp of ``g_ijt`` over the real tokens of all other sentences.

    Args:
        rows: Local sentence vectors ``[R, D]``, the only differentiable input.
        own_tokens: Token features ``[R, T, D]`` of the rows' own sentences.
        own_mask: ``[R, T]``, nonzero for a real token; a row without any costs 0.
        tokens: Token features ``[N, T', D]`` of the global batch, own sentences included.
        mask: ``[N, T']``, nonzero for a real token.
        temperature: Divides the products, positive.
        norm: "token" for unit tokens; "axis" for the published division of each feature by its
            norm over the token axis, which depends on the padding.
        unit_rows: Normalize the rows; the published code does not.
        row_ids: Image ids ``[R]``; sentences of the same image (ids >= 0) are not negatives.
        col_ids: Image ids ``[N]``, given together with `row_ids`.
        col_offset: Sentence index of row 0 in `tokens`.
        impl: "torch" (streams over sentences), "reference" (builds ``[R, N, T]``) or "auto".
        chunk_rows: Rows per chunk of "torch"; by default what fits `workspace_bytes`.
        workspace_bytes: Temporary memory of "torch"; default 256 MiB, on CUDA 1 GiB.

    Returns:
        The mean over the local rows, a scalar in float32 or float64.

    Raises:
        ValueError: Shapes, types, devices or values that do not fit, named in the message.
    """
    resolved = checks.implementation(impl, WITHOUT_KERNEL)
    workspace = workspace_of(rows.device, chunk_rows, workspace_bytes)
    arguments = TokenArguments(
        own_tokens, own_mask, tokens, mask, norm, temperature, col_offset, row_ids, col_ids
    ).checked(rows)
    with torch.autocast(rows.device.type, enabled=False):
        values = rows.to(checks.compute_dtype(rows))
        values = unit(values) if unit_rows else values
        if resolved == "torch":
            return stream_global_to_local(values, arguments, chunk_rows, workspace)
        return _dense_global_to_local(values, arguments)


def _dense_global_to_local(rows_RD: Tensor, arguments: TokenArguments) -> Tensor:
    excluded = reference.excluded_elements(
        rows_RD.shape[0], arguments.tokens_NTD.shape[0], arguments.col_offset,
        arguments.row_ids, arguments.col_ids, rows_RD.device, own=True,
    )  # fmt: skip
    return reference.global_to_local_rows(
        rows_RD,
        reference.normalize_tokens(arguments.own_RTD.to(rows_RD.dtype), arguments.norm),
        arguments.own_mask_RT,
        reference.normalize_tokens(arguments.tokens_NTD.to(rows_RD.dtype), arguments.norm),
        arguments.mask_NT,
        excluded,
        temperature=arguments.temperature,
    ).mean()


def consistency(
    text_BD: Tensor,
    image_BD: Tensor,
    unmatched_image_BD: Tensor,
    keep_B: Tensor | None = None,
    *,
    margin: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Consistency loss of DALR's auxiliary task (L_cons), as a sum and a count.

    Matched pairs cost ``1 - cos``, unmatched ones ``max(0, cos - margin)``. The mean over a global
    batch needs the global count, so the caller divides: on each of W ranks
    ``sum * W / global count``, followed by the usual averaging of gradients.

    Args:
        text_BD: Aligned texts ``[B, D]``.
        image_BD: Aligned images of the same rows.
        unmatched_image_BD: Aligned images of other rows.
        keep_B: Boolean ``[B]``; False drops the *unmatched* pair of that row. ``None`` keeps all.
        margin: Cosine below which an unmatched pair costs nothing.

    Returns:
        The sum over the kept terms and their number, scalars in float32 or float64.

    Raises:
        ValueError: Shapes, types or devices that do not fit, named in the message.
    """
    checks.matrix("text_BD", text_BD)
    for name, images in (("image_BD", image_BD), ("unmatched_image_BD", unmatched_image_BD)):
        checks.matrix(name, images)
        if images.shape != text_BD.shape:
            raise ValueError(f"{name} is {tuple(images.shape)}, text_BD {tuple(text_BD.shape)}")
        checks.same_device(name, images, text_BD)
    if keep_B is not None and keep_B.shape != text_BD.shape[:1]:
        raise ValueError(f"keep_B must be ({text_BD.shape[0]},), got {tuple(keep_B.shape)}")
    dtype = checks.compute_dtype(text_BD, image_BD, unmatched_image_BD)
    texts = unit(text_BD.to(dtype))
    matched_B = 1.0 - (texts * unit(image_BD.to(dtype))).sum(dim=1)
    unmatched_B = ((texts * unit(unmatched_image_BD.to(dtype))).sum(dim=1) - margin).relu()
    kept_B = torch.ones_like(matched_B) if keep_B is None else (keep_B != 0).to(dtype)
    # A product, not a mask, is safe here: cosines of finite vectors are finite.
    return matched_B.sum() + (unmatched_B * kept_B).sum(), kept_B.sum() + texts.shape[0]


def _mean(rows: Tensor, cols: Tensor, term: Term, col_offset: int, how: How) -> Tensor:
    checks.rows_and_columns(rows, cols, col_offset)
    term.check(rows, cols)
    return weighted_mean(rows, cols, [term], col_offset, how)[0]
