"""Device code of the gated hook in Triton; the launchers are in ``triton.py``.

    part[s] = x S^T over chunk s of n        _project_kernel     [splits, N, pitch] float32
    and, where asked, y = x W0^T + b
    f = sum_s part[s];  M = ||f|| or max f   _reduce_kernel      sums in the order of the chunks
    f = -inf for edits that are not armed    triton_cue_kernels  membership with cues, before M
    M = max_g sum_{j in g} f_j               _group_max_kernel   membership with groups
    z, fired                                 _gate_kernel        one program per sequence, float64
    index, count of the fired tokens         _list_kernel
    y[t] += Q f[t] for the listed tokens     _correct_kernel     the bytes of the others stay

Every sum has one fixed order that depends on the sizes of the hook alone, and there are no atomics:
a token's score is the same bits on every run and whatever else is in the batch. No value is read
back to the host. This module imports triton; only ``triton.py`` imports it, on first use.

Prefixes: ``i_`` program index, ``o_`` offsets, ``m_`` masks, ``p_`` pointers, ``b_`` values. Tiles
are ``BT`` tokens, ``BF`` features, ``BK`` steps of a sum, ``BM`` outputs.
"""
# Types of kernel arguments are the comments beside them.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter has no bfloat16 product; the product of the same numbers in float32 is exact.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

NO_REDUCTION = tl.constexpr(0)
NORM = tl.constexpr(1)
LARGEST = tl.constexpr(2)

SEQUENCE = tl.constexpr(0)
PREFIX = tl.constexpr(1)
POPULATION = tl.constexpr(2)
DIRECT = tl.constexpr(3)
UNGATED = tl.constexpr(4)

# A standard deviation within this share of the mean is rounding noise of float32 norms.
_NOISE = tl.constexpr(8 * 2.0**-23)
# Keeps the low half of a float16 pair out of the subnormal numbers.
_LOW_SCALE = tl.constexpr(2048.0)
_FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit
def _dot(b_a, b_b, b_sum):
    if _INTERPRETED:
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision="ieee")


@triton.jit(do_not_specialize=["tokens"])
def _project_kernel(
    x_ptr,  # [tokens, depth], rows `stride_x` apart
    s_ptr,  # [features, depth], rows `stride_s` apart
    part_ptr,  # float32 [splits, tokens, pitch]
    squares_ptr,  # float32 [tokens, feature tiles], or None
    weight_ptr,  # [features, depth], rows `stride_weight` apart, dtype of x; None: f alone
    bias_ptr,  # [features], or None
    y_ptr,  # [tokens, features], becomes x W0^T + b
    tokens,
    features,
    depth,
    stride_x,
    stride_s,
    stride_weight,
    pitch,
    chunk,  # multiple of BK; all of depth beside W0
    PAIR: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """One chunk of ``f = x S^T``, transposed: S is the left operand, x^T the right one.

    PAIR: S has more digits than x. It is cut into a high and a low number of x's dtype, and both
    products are kept in float32. The left operand of a tensor-core product may stay in registers,
    so the cut costs no shared memory.

    With W0, of a dense hook, the frozen product is formed from the same tile of x.
    """
    i_tile = tl.program_id(0)
    i_split = tl.program_id(1).to(tl.int64)
    n_t = tl.cdiv(tokens, BT)
    n_f = tl.cdiv(features, BF)
    # GROUP tiles of tokens share the tiles of S while those are in the L2 cache.
    i_group = i_tile // (GROUP * n_f)
    first = i_group * GROUP
    size = tl.minimum(n_t - first, GROUP)
    i_in_group = i_tile % (GROUP * n_f)
    i_t = first + i_in_group % size
    i_f = i_in_group // size

    o_t = i_t.to(tl.int64) * BT + tl.arange(0, BT)
    o_f = i_f * BF + tl.arange(0, BF)
    o_k = tl.arange(0, BK)
    m_t = o_t < tokens
    m_f = o_f < features
    p_x = x_ptr + o_t[None, :] * stride_x + o_k[:, None]
    p_s = s_ptr + o_f[:, None].to(tl.int64) * stride_s + o_k[None, :]

    b_f = tl.zeros((BF, BT), tl.float32)
    b_low_f = tl.zeros((BF, BT), tl.float32)
    b_p = tl.zeros((BF, BT), tl.float32)
    start = tl.program_id(1) * chunk
    for k in range(start, tl.minimum(start + chunk, depth), BK):
        m_k = k + o_k < depth
        b_x = tl.load(p_x + k, mask=m_k[:, None] & m_t[None, :], other=0.0)
        b_s = tl.load(p_s + k, mask=m_f[:, None] & m_k[None, :], other=0.0)
        if weight_ptr is not None:
            p_w = weight_ptr + o_f[:, None].to(tl.int64) * stride_weight + (k + o_k)[None, :]
            b_w = tl.load(p_w, mask=m_f[:, None] & m_k[None, :], other=0.0)
            b_p = _dot(b_w, b_x, b_p)
        if PAIR:
            b_s = b_s.to(tl.float32)
            if b_x.dtype == tl.float16:
                b_s = tl.clamp(b_s, -_FLOAT16_MAX, _FLOAT16_MAX, propagate_nan=tl.PropagateNan.ALL)
            b_high = b_s.to(b_x.dtype)
            b_low = ((b_s - b_high.to(tl.float32)) * _LOW_SCALE).to(b_x.dtype)
            b_f = _dot(b_high, b_x, b_f)
            b_low_f = _dot(b_low, b_x, b_low_f)
        else:
            b_f = _dot(b_s.to(b_x.dtype), b_x, b_f)
    if PAIR:
        b_f += b_low_f * (1.0 / _LOW_SCALE)

    p_part = part_ptr + (i_split * tokens + o_t)[None, :] * pitch + o_f[:, None]
    tl.store(p_part, b_f, mask=m_f[:, None] & m_t[None, :])
    if squares_ptr is not None:
        tl.store(squares_ptr + o_t * n_f + i_f, tl.sum(b_f * b_f, axis=0), mask=m_t)
    if weight_ptr is not None:
        if bias_ptr is not None:
            b_p += tl.load(bias_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)[:, None]
        p_y = y_ptr + o_t[None, :] * features + o_f[:, None]
        tl.store(p_y, b_p.to(y_ptr.dtype.element_ty), mask=m_f[:, None] & m_t[None, :])


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _reduce_kernel(
    part_ptr,  # float32 [splits, tokens, pitch]; part[0] becomes their sum
    squares_ptr,  # float32 [tokens, tiles], or None
    magnitude_ptr,  # float32 [tokens]
    winner_ptr,  # int32 [tokens]: the largest feature
    z_ptr,  # float32 [tokens], made NaN
    fired_ptr,  # uint8 [tokens], made 0
    tokens,
    features,
    pitch,
    tiles,
    SPLITS: tl.constexpr,
    REDUCTION: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < tokens
    o_f = tl.arange(0, BF)
    # Tokens that no sequence of cu_seqlens covers stay like this.
    tl.store(z_ptr + o_t, tl.full((BT,), float("nan"), tl.float32), mask=m_t)
    tl.store(fired_ptr + o_t, tl.zeros((BT,), tl.uint8), mask=m_t)

    b_squares = tl.zeros((BT, BF), tl.float32)
    b_best = tl.full((BT,), float("-inf"), tl.float32)
    b_winner = tl.zeros((BT,), tl.int32)
    b_nan = tl.zeros((BT,), tl.int32)
    if squares_ptr is not None:
        for i in range(0, tiles, BF):
            m = m_t[:, None] & (i + o_f < tiles)[None, :]
            p_squares = squares_ptr + o_t[:, None] * tiles + (i + o_f)[None, :]
            b_squares += tl.load(p_squares, mask=m, other=0.0)
    elif SPLITS > 1 or REDUCTION != NO_REDUCTION:
        for j in range(0, features, BF):
            m_f = j + o_f < features
            m = m_t[:, None] & m_f[None, :]
            p_part = part_ptr + o_t[:, None] * pitch + (j + o_f)[None, :]
            b_f = tl.load(p_part, mask=m, other=0.0)
            for i_split in tl.static_range(1, SPLITS):
                offset = tl.full((), i_split, tl.int64) * tokens * pitch
                b_f += tl.load(p_part + offset, mask=m, other=0.0)
            if SPLITS > 1:
                tl.store(p_part, b_f, mask=m)
            if REDUCTION == NORM:
                b_squares += b_f * b_f
            if REDUCTION == LARGEST:
                b_nan += tl.sum((b_f != b_f).to(tl.int32), axis=1)
                b_f = tl.where(m_f[None, :] & (b_f == b_f), b_f, float("-inf"))
                b_here, b_where = tl.max(b_f, axis=1, return_indices=True)
                b_winner = tl.where(b_here > b_best, j + b_where.to(tl.int32), b_winner)
                b_best = tl.maximum(b_best, b_here)
    if REDUCTION == NORM:
        tl.store(magnitude_ptr + o_t, tl.sqrt_rn(tl.sum(b_squares, axis=1)), mask=m_t)
    if REDUCTION == LARGEST:
        b_best = tl.where(b_nan > 0, float("nan"), b_best)
        tl.store(magnitude_ptr + o_t, b_best, mask=m_t)
        tl.store(winner_ptr + o_t, b_winner, mask=m_t)


@triton.jit(do_not_specialize=["tokens"])
def _group_max_kernel(
    feature_ptr,  # float32 [tokens, pitch]
    groups_ptr,  # int64 [features]
    magnitude_ptr,  # float32 [tokens]
    winner_ptr,  # int32 [tokens]: the best group
    tokens,
    features,
    pitch,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """Largest sum over the features of a group: a product with the 0/1 matrix of membership."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < tokens
    o_f = tl.arange(0, BF)
    b_best = tl.full((BT,), float("-inf"), tl.float32)
    b_winner = tl.zeros((BT,), tl.int32)
    b_nan = tl.zeros((BT,), tl.int32)
    for g in range(0, features, BF):
        b_sums = tl.zeros((BT, BF), tl.float32)
        b_used = tl.zeros((BF,), tl.int32)
        for j in range(0, features, BF):
            m_f = j + o_f < features
            p_feature = feature_ptr + o_t[:, None] * pitch + (j + o_f)[None, :]
            b_f = tl.load(p_feature, mask=m_t[:, None] & m_f[None, :], other=0.0)
            b_group = tl.load(groups_ptr + j + o_f, mask=m_f, other=-1)
            b_member = (b_group[:, None] == (g + o_f)[None, :]).to(tl.int32)
            b_sums = tl.dot(b_f, b_member.to(tl.float32), b_sums, input_precision="ieee")
            b_used += tl.sum(b_member, axis=0)
        b_nan += tl.sum((b_sums != b_sums).to(tl.int32), axis=1)
        b_sums = tl.where((b_used > 0)[None, :] & (b_sums == b_sums), b_sums, float("-inf"))
        b_here, b_where = tl.max(b_sums, axis=1, return_indices=True)
        b_winner = tl.where(b_here > b_best, g + b_where.to(tl.int32), b_winner)
        b_best = tl.maximum(b_best, b_here)
    tl.store(magnitude_ptr + o_t, tl.where(b_nan > 0, float("nan"), b_best), mask=m_t)
    tl.store(winner_ptr + o_t, b_winner, mask=m_t)


@triton.jit
def _real(mask_ptr, o_t, end):
    m_t = o_t < end
    if mask_ptr is not None:
        m_t = m_t & (tl.load(mask_ptr + o_t, mask=m_t, other=0) != 0)
    return m_t


@triton.jit
def _standard_score(b_magnitude, shift, mean, std):
    # Written so that a NaN on either side leaves z undefined too.
    std = tl.where(std > _NOISE * (shift + mean), std, float("nan"))
    return (((b_magnitude - shift) - mean) / std).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "length", "alpha"])
def _gate_kernel(
    magnitude_ptr,  # float32 [tokens]
    mask_ptr,  # uint8 [tokens], or None
    cu_seqlens_ptr,  # [sequences + 1], or None: every sequence has `length` tokens
    mean_ptr,  # float64 [sequences], or [1] with stride 0
    std_ptr,
    state_ptr,  # [sequences, 3], or None
    alpha_ptr,  # 0-dim, or None: `alpha` holds the threshold
    alpha,
    z_ptr,  # float32 [tokens]
    fired_ptr,  # uint8 [tokens]
    tokens,
    length,
    stride_mean,
    stride_std,
    stride_state,
    stride_moment,
    SCOPE: tl.constexpr,
    CUED: tl.constexpr,
    BT: tl.constexpr,
):
    """Statistics, scores and decisions of one sequence.

    The tokens are counted from the first real one, whose magnitude is subtracted from all: padding
    on the left changes no order, and equal magnitudes have a standard deviation of exactly zero.
    """
    i_s = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        begin = i_s * length
        end = begin + length
    else:
        # The values are on the device, so no host check saw them.
        begin = tl.maximum(tl.load(cu_seqlens_ptr + i_s).to(tl.int64), 0)
        end = tl.minimum(tl.load(cu_seqlens_ptr + i_s + 1).to(tl.int64), tokens)
    o = tl.arange(0, BT)
    threshold = alpha
    if alpha_ptr is not None:
        threshold = tl.load(alpha_ptr).to(tl.float32)

    first = begin
    if mask_ptr is not None:
        b_first = tl.zeros((BT,), tl.int64) + end
        for t in range(begin, end, BT):
            b_first = tl.minimum(b_first, tl.where(_real(mask_ptr, t + o, end), t + o, end))
        first = tl.min(b_first, axis=0)
    shift = tl.load(magnitude_ptr + first, mask=first < end, other=0.0).to(tl.float64)
    p_state = state_ptr
    if state_ptr is not None:
        p_state = state_ptr + i_s * stride_state

    mean = shift * 0.0
    std = mean
    if SCOPE == SEQUENCE:
        b_count = tl.zeros((BT,), tl.float64)
        b_sum = tl.zeros((BT,), tl.float64)
        for t in range(first, end, BT):
            m_t = _real(mask_ptr, t + o, end)
            b_d = tl.load(magnitude_ptr + t + o, mask=m_t, other=0.0).to(tl.float64) - shift
            b_count += tl.where(m_t, 1.0, 0.0)
            b_sum += tl.where(m_t, b_d, 0.0)
        count = tl.sum(b_count, axis=0)
        mean = tl.sum(b_sum, axis=0) / tl.maximum(count, 1.0)
        b_m2 = tl.zeros((BT,), tl.float64)
        for t in range(first, end, BT):
            m_t = _real(mask_ptr, t + o, end)
            b_d = tl.load(magnitude_ptr + t + o, mask=m_t, other=0.0).to(tl.float64) - shift
            b_d = tl.where(m_t, b_d - mean, 0.0)
            b_m2 += b_d * b_d
        m2 = tl.sum(b_m2, axis=0)
        std = tl.where(count > 1, tl.sqrt(m2 / tl.maximum(count - 1.0, 1.0)), float("nan"))
        if state_ptr is not None:
            kind = state_ptr.dtype.element_ty
            tl.store(p_state, count.to(kind))
            tl.store(p_state + stride_moment, (shift + mean).to(kind))
            tl.store(p_state + 2 * stride_moment, m2.to(kind))
    if SCOPE == POPULATION:
        shift = mean
        mean = tl.load(mean_ptr + i_s * stride_mean)
        std = tl.load(std_ptr + i_s * stride_std)

    if SCOPE == PREFIX:
        count = mean
        total = mean
        squares = mean
        if state_ptr is not None:
            count = tl.load(p_state).to(tl.float64)
            squares = tl.load(p_state + 2 * stride_moment).to(tl.float64)
            kept = tl.load(p_state + stride_moment).to(tl.float64)
            shift = tl.where(count > 0, kept, shift)
        for t in range(first, end, BT):
            m_t = _real(mask_ptr, t + o, end)
            b_magnitude = tl.load(magnitude_ptr + t + o, mask=m_t, other=0.0).to(tl.float64)
            b_one = tl.where(m_t, 1.0, 0.0).to(tl.float64)
            b_d = tl.where(m_t, b_magnitude - shift, 0.0)
            b_count = count + tl.cumsum(b_one, axis=0)
            b_total = total + tl.cumsum(b_d, axis=0)
            b_squares = squares + tl.cumsum(b_d * b_d, axis=0)
            b_mean = b_total / tl.maximum(b_count, 1.0)
            b_m2 = b_squares - b_total * b_mean
            b_m2 = tl.where(b_m2 < 0, 0.0, b_m2)
            b_std = tl.sqrt(b_m2 / tl.maximum(b_count - 1.0, 1.0))
            b_std = tl.where(b_count > 1, b_std, float("nan"))
            b_z = _standard_score(b_magnitude, shift, b_mean, b_std)
            tl.store(z_ptr + t + o, tl.where(m_t, b_z, float("nan")), mask=t + o < end)
            tl.store(fired_ptr + t + o, (m_t & (b_z >= threshold)).to(tl.uint8), mask=t + o < end)
            count += tl.sum(b_one, axis=0)
            total += tl.sum(b_d, axis=0)
            squares += tl.sum(b_d * b_d, axis=0)
        if state_ptr is not None:
            kind = state_ptr.dtype.element_ty
            mean = total / tl.maximum(count, 1.0)
            m2 = squares - total * mean
            tl.store(p_state, count.to(kind))
            tl.store(p_state + stride_moment, (shift + mean).to(kind))
            tl.store(p_state + 2 * stride_moment, tl.where(m2 < 0, 0.0, m2).to(kind))
    else:
        for t in range(begin, end, BT):
            m_t = _real(mask_ptr, t + o, end)
            b_fired = m_t
            if SCOPE != UNGATED:
                b_z = tl.load(magnitude_ptr + t + o, mask=m_t, other=float("nan"))
                if SCOPE != DIRECT:
                    b_z = _standard_score(b_z.to(tl.float64), shift, mean, std)
                tl.store(z_ptr + t + o, tl.where(m_t, b_z, float("nan")), mask=t + o < end)
                b_fired = m_t & (b_z >= threshold)
                if CUED:
                    # No edit is armed there, and -inf may be the threshold.
                    b_fired = b_fired & (b_z > float("-inf"))
            tl.store(fired_ptr + t + o, b_fired.to(tl.uint8), mask=t + o < end)


@triton.jit(do_not_specialize=["tokens"])
def _list_kernel(fired_ptr, index_ptr, count_ptr, tokens, BT: tl.constexpr):
    """Indices of the fired tokens, in order: int32 ``index[:count]``; one program."""
    o = tl.arange(0, BT)
    count = 0
    for t in range(0, tokens, BT):
        m_t = t + o < tokens
        b_fired = tl.load(fired_ptr + t + o, mask=m_t, other=0).to(tl.int32)
        b_slot = count + tl.cumsum(b_fired, axis=0) - 1
        tl.store(index_ptr + b_slot, t + o, mask=b_fired != 0)
        count += tl.sum(b_fired, axis=0)
    tl.store(count_ptr, count)


@triton.jit
def _correct_kernel(
    y_ptr,  # [tokens, outputs], rows `stride_y` apart, holds the frozen output
    feature_ptr,  # float32 [tokens, pitch]
    lift_ptr,  # [outputs, features], rows `stride_lift` apart; None: features are outputs
    index_ptr,  # int32 [tokens]
    count_ptr,  # int32 [1]
    winner_ptr,  # int32 [tokens]; None: every feature counts
    groups_ptr,  # int64 [features]; None: every feature is its own group
    magnitude_ptr,  # float32 [tokens]: the sum of the winner's features
    outputs,
    features,
    pitch,
    stride_y,
    stride_lift,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """``y[t] += Q f[t]`` for BT listed tokens and BM outputs, rounded once."""
    count = tl.load(count_ptr)
    i_t = tl.program_id(0)
    if i_t * BT >= count:
        return
    o_i = i_t * BT + tl.arange(0, BT)
    m_t = o_i < count
    o_t = tl.load(index_ptr + o_i, mask=m_t, other=0).to(tl.int64)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_m = o_m < outputs
    m_y = m_t[:, None] & m_m[None, :]
    p_feature = feature_ptr + o_t[:, None] * pitch
    if lift_ptr is None:
        b_added = tl.load(p_feature + o_m[None, :], mask=m_y, other=0.0)
    elif winner_ptr is not None and groups_ptr is None:
        # One edit's column alone: thousands of others need not be looked at.
        b_winner = tl.load(winner_ptr + o_t, mask=m_t, other=0)[:, None]
        b_total = tl.load(magnitude_ptr + o_t, mask=m_t, other=1.0)[:, None]
        b_f = tl.load(p_feature + b_winner, mask=m_t[:, None], other=0.0)
        b_f = b_f / tl.where(b_total == 0, 1.0, b_total)
        p_lift = lift_ptr + o_m[None, :].to(tl.int64) * stride_lift + b_winner
        b_added = b_f * tl.load(p_lift, mask=m_y, other=0.0).to(tl.float32)
    else:
        o_k = tl.arange(0, BK)
        b_added = tl.zeros((BT, BM), tl.float32)
        if winner_ptr is not None:
            b_winner = tl.load(winner_ptr + o_t, mask=m_t, other=-1)
            b_total = tl.load(magnitude_ptr + o_t, mask=m_t, other=1.0)
            b_total = tl.where(b_total == 0, 1.0, b_total)
        for k in range(0, features, BK):
            m_k = k + o_k < features
            b_f = tl.load(
                p_feature + (k + o_k)[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0
            )
            if winner_ptr is not None:
                b_group = tl.load(groups_ptr + k + o_k, mask=m_k, other=-1).to(tl.int32)
                b_own = b_group[None, :] == b_winner[:, None]
                b_f = tl.where(b_own, b_f, 0.0) / b_total[:, None]
            p_lift = lift_ptr + o_m[None, :].to(tl.int64) * stride_lift + (k + o_k)[:, None]
            b_q = tl.load(p_lift, mask=m_k[:, None] & m_m[None, :], other=0.0)
            b_added = tl.dot(b_f, b_q.to(tl.float32), b_added, input_precision=PRECISION)
    p_y = y_ptr + o_t[:, None] * stride_y + o_m[None, :]
    b_y = tl.load(p_y, mask=m_y, other=0.0).to(tl.float32) + b_added
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_y)
