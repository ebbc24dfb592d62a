"""Device code of cues in Triton: which edits are armed at which tokens, see :mod:`.cues`.

    word[c, e]                     _words_kernel   which tokens of chunk c reached e's limit
    entry[c, e]                    _read_kernel    what was seen before chunk c; the state read on
    f[t, e] = -inf where unarmed   _arm_kernel     sums the parts of f where there are several

A chunk is up to 32 tokens of one sequence. Bit 31 - j of its word says whether its token j reached
the edit's limit. Like a register, a word has its latest column lowest: the register before token j
is ``entry << j | word >> (32 - j)``, so all tokens of a chunk are judged at once and no score is
read more than once. Where a sequence is one chunk, `_short_kernel` does all three.

Everything is a bit or an integer: there is no order to keep. Only `_read_kernel` goes through a
sequence chunk by chunk, and reads eight bytes of each 32 tokens and edit.

Programs are one chunk (or sequence) and BE edits. Prefixes as in ``triton_kernels.py``.
"""
# Types of kernel arguments are the comments beside them.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

# Tokens of a chunk, see above.
CHUNK = tl.constexpr(32)
# As in ``cues.py``, which the tests compare these with.
_REGISTER = tl.constexpr(63)
_ALL = tl.constexpr((1 << 63) - 1)
_MOST_APART = tl.constexpr(7)
_APART_BITS = tl.constexpr((1 << 7) - 1)
_NEVER = tl.constexpr(2**31 - 1)
# Sequences of a packed batch looked at together.
_BS = tl.constexpr(128)


@triton.jit
def _bounds(cu_seqlens_ptr, o_s, m_s, tokens):
    # The values are on the device, so no host check saw them.
    b_begin = tl.load(cu_seqlens_ptr + o_s, mask=m_s, other=0).to(tl.int64)
    b_end = tl.load(cu_seqlens_ptr + o_s + 1, mask=m_s, other=0).to(tl.int64)
    return tl.maximum(b_begin, 0), tl.minimum(b_end, tokens)


@triton.jit
def _chunks(b_begin, b_end):
    return tl.maximum(b_end - b_begin + CHUNK - 1, 0) // CHUNK


@triton.jit
def _of_chunk(i_c, cu_seqlens_ptr, tokens, length, sequences):
    """Sequence, first token, and end of the sequence of chunk ``i_c``; no token where no such."""
    if cu_seqlens_ptr is None:
        in_each = tl.cdiv(length, CHUNK)
        i_s = i_c // in_each
        begin = i_s * length
        start = begin + (i_c % in_each) * CHUNK
        end = begin + length
    else:
        before = i_c * 0
        i_s = before
        begin = before
        start = before
        end = before
        for s in range(0, sequences, _BS):
            o_s = s + tl.arange(0, _BS)
            b_begin, b_end = _bounds(cu_seqlens_ptr, o_s, o_s < sequences, tokens)
            b_count = _chunks(b_begin, b_end)
            b_past = before + tl.cumsum(b_count, axis=0)
            b_here = (b_past > i_c) & (b_past - b_count <= i_c)
            b_start = b_begin + (i_c - (b_past - b_count)) * CHUNK
            i_s += tl.sum(tl.where(b_here, o_s, 0).to(tl.int64), axis=0)
            begin += tl.sum(tl.where(b_here, b_begin, 0), axis=0)
            start += tl.sum(tl.where(b_here, b_start, 0), axis=0)
            end += tl.sum(tl.where(b_here, b_end, 0), axis=0)
            before += tl.sum(b_count, axis=0)
    return i_s, begin, start, end


@triton.jit
def _of_sequence(i_s, cu_seqlens_ptr, tokens, length):
    """First chunk, first token, and end of a sequence."""
    if cu_seqlens_ptr is None:
        chunk = i_s * tl.cdiv(length, CHUNK)
        begin = i_s * length
        end = begin + length
    else:
        chunk = i_s * 0
        for s in range(0, i_s, _BS):
            o_s = s + tl.arange(0, _BS)
            b_begin, b_end = _bounds(cu_seqlens_ptr, o_s, o_s < i_s, tokens)
            chunk += tl.sum(_chunks(b_begin, b_end), axis=0)
        begin, end = _bounds(cu_seqlens_ptr, i_s, i_s >= 0, tokens)
        end = tl.maximum(begin, end)
    return chunk, begin, end


@triton.jit
def _word(
    seen_ptr, mask_ptr, limits_ptr, start, end, o_e, m_e, tokens, pitch, SPLITS: tl.constexpr
):
    o_j = tl.arange(0, CHUNK).to(tl.int64)
    m_t = start + o_j < end
    m = m_t[:, None] & m_e[None, :]
    p_seen = seen_ptr + (start + o_j)[:, None] * pitch + o_e[None, :]
    b_seen = tl.load(p_seen, mask=m, other=0.0)
    for i_split in tl.static_range(1, SPLITS):
        offset = tl.full((), i_split, tl.int64) * tokens * pitch
        b_seen += tl.load(p_seen + offset, mask=m, other=0.0)
    if mask_ptr is not None:
        m_t = m_t & (tl.load(mask_ptr + start + o_j, mask=m_t, other=0) != 0)
    b_limit = tl.load(limits_ptr + o_e, mask=m_e, other=float("inf")).to(tl.float32)
    # A token of NaN reaches no limit, except one that needs nothing to be seen.
    b_reached = (b_seen >= b_limit[None, :]) | (b_limit == float("-inf"))[None, :]
    b_reached = b_reached & m_t[:, None] & m_e[None, :]
    return tl.sum(b_reached.to(tl.int64) << (-o_j + (CHUNK - 1))[:, None], axis=0)


@triton.jit
def _asked(limits_ptr, reaches_ptr, gaps_ptr, o_e, m_e):
    """Whether an edit is bounded, how far apart its two tokens are, and its window of columns."""
    b_bounded = o_e < 0
    b_apart = o_e * 0
    b_window = b_apart
    if reaches_ptr is not None:
        b_limit = tl.load(limits_ptr + o_e, mask=m_e, other=float("inf")).to(tl.float32)
        b_reach = tl.load(reaches_ptr + o_e, mask=m_e, other=0).to(tl.int64)
        if gaps_ptr is not None:
            b_gap = tl.load(gaps_ptr + o_e, mask=m_e, other=0).to(tl.int64)
            b_apart = tl.minimum(tl.maximum(b_gap, 0), _MOST_APART)
        b_known = tl.minimum(b_reach, _REGISTER) + b_apart
        b_bounded = (b_known < _REGISTER) & (b_limit != float("-inf"))
        b_apart = tl.where(b_bounded, b_apart, 0)
        b_length = tl.minimum(tl.maximum(b_reach, 0), _REGISTER - 1)
        b_window = (tl.full(o_e.shape, 1, tl.int64) << b_length) - 1
    return b_bounded, b_apart, b_window


@triton.jit
def _highest(b_bits):
    """Number of the highest bit of integers of 32 bits, of which one is set."""
    b_number = b_bits * 0
    for i in tl.static_range(5):
        b_high = b_bits >> (16 >> i)
        b_number += tl.where(b_high != 0, 16 >> i, 0)
        b_bits = tl.where(b_high != 0, b_high, b_bits)
    return b_number


@triton.jit
def _at(o_e, edits, left):
    """The edits, at a chunk for which some tokens are left."""
    return o_e < tl.where(left > 0, edits, 0)


@triton.jit
def _entry(b_register, b_first, b_bounded, column):
    # What an unbounded edit has to know of the past is one bit.
    return tl.where(b_bounded, b_register, (b_first < column).to(tl.int64))


@triton.jit
def _read_on(b_register, b_first, b_word, b_bounded, b_apart, column, count):
    """Register and first column after a chunk of ``count`` tokens that starts at ``column``."""
    b_near = ((b_register & _APART_BITS) << CHUNK) | b_word
    b_shown = b_word & (b_near >> b_apart)
    b_at = column + CHUNK - 1 - _highest(b_shown)
    b_first = tl.where(b_shown != 0, tl.minimum(b_first, b_at), b_first)
    b_new = tl.where(b_bounded, b_word, 0) >> (-count + CHUNK)
    return ((b_register << count) | b_new) & _ALL, b_first


@triton.jit
def _state_in(state_ptr, i_s, o_e, m_e, edits, stride_row, stride_state):
    p_state = state_ptr + i_s * stride_row
    p_first = p_state + (1 + o_e) * stride_state
    b_first = tl.load(p_first, mask=m_e, other=0).to(tl.int64)
    b_register = tl.load(p_first + edits * stride_state, mask=m_e, other=0).to(tl.int64)
    return tl.load(p_state).to(tl.int64), b_first, b_register


@triton.jit
def _state_out(
    state_ptr,
    i_s,
    o_e,
    m_e,
    edits,
    stride_row,
    stride_state,
    b_first,
    b_register,
    REGISTERS: tl.constexpr,
):
    p_first = state_ptr + i_s * stride_row + (1 + o_e) * stride_state
    tl.store(p_first, b_first, mask=m_e)
    if REGISTERS:
        tl.store(p_first + edits * stride_state, b_register, mask=m_e)


@triton.jit
def _arm(
    part_ptr,
    b_entry,
    b_word,
    b_bounded,
    b_apart,
    b_window,
    start,
    end,
    o_e,
    m_e,
    tokens,
    pitch,
    SPLITS: tl.constexpr,
):
    o_j = tl.arange(0, CHUNK).to(tl.int64)
    b_early = b_word[None, :] >> (-o_j + CHUNK)[:, None]
    b_register = ((b_entry[None, :] << o_j[:, None]) | b_early) & _ALL
    b_shown = b_register & (b_register >> b_apart[None, :])
    b_recent = (b_shown & b_window[None, :]) != 0
    # The token itself counts too where any earlier one does.
    b_any = (b_entry[None, :] | (b_word[None, :] >> (-o_j + (CHUNK - 1))[:, None])) != 0
    b_armed = tl.where(b_bounded[None, :], b_recent, b_any)
    m = (start + o_j < end)[:, None] & m_e[None, :]
    p_part = part_ptr + (start + o_j)[:, None] * pitch + o_e[None, :]
    b_none = tl.full((CHUNK, o_e.shape[0]), float("-inf"), tl.float32)
    if SPLITS == 1:
        tl.store(p_part, b_none, mask=m & (b_armed == 0))
    else:
        b_f = tl.load(p_part, mask=m & b_armed, other=float("-inf"))
        for i_split in tl.static_range(1, SPLITS):
            offset = tl.full((), i_split, tl.int64) * tokens * pitch
            b_f += tl.load(p_part + offset, mask=m & b_armed, other=0.0)
        tl.store(p_part, b_f, mask=m)


@triton.jit(do_not_specialize=["tokens", "length", "sequences"])
def _words_kernel(
    seen_ptr,  # float32 [SPLITS, tokens, pitch], scores of the cues
    limits_ptr,  # floating [edits]
    mask_ptr,  # uint8 [tokens], or None
    cu_seqlens_ptr,  # [sequences + 1], or None: every sequence has `length` tokens
    word_ptr,  # int64 [chunks, edits]
    tokens,
    length,
    sequences,
    edits,
    pitch,
    SPLITS: tl.constexpr,
    BE: tl.constexpr,
):
    i_c = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < edits
    _, _, start, end = _of_chunk(i_c, cu_seqlens_ptr, tokens, length, sequences)
    b_word = _word(seen_ptr, mask_ptr, limits_ptr, start, end, o_e, m_e, tokens, pitch, SPLITS)
    tl.store(word_ptr + i_c * edits + o_e, b_word, mask=m_e)


@triton.jit(do_not_specialize=["tokens", "length"])
def _read_kernel(
    word_ptr,  # int64 [chunks, edits]
    entry_ptr,  # int64 [chunks, edits]
    limits_ptr,
    reaches_ptr,  # int32 [edits], or None
    gaps_ptr,  # int32 [edits], or None
    cu_seqlens_ptr,
    state_ptr,  # int64 [sequences, 1 + 2 edits], or None; all but its counts are read on
    tokens,
    length,
    edits,
    stride_row,
    stride_state,
    BE: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < edits
    chunk, begin, end = _of_sequence(i_s, cu_seqlens_ptr, tokens, length)
    b_bounded, b_apart, _ = _asked(limits_ptr, reaches_ptr, gaps_ptr, o_e, m_e)
    column = i_s * 0
    b_register = o_e * 0
    b_first = b_register + _NEVER
    if state_ptr is not None:
        column, b_first, b_register = _state_in(
            state_ptr, i_s, o_e, m_e, edits, stride_row, stride_state
        )
    p = chunk * edits + o_e
    for t in range(begin, end, 4 * CHUNK):
        # Four words are on their way together: to wait for each would take most of the time.
        left = end - t
        b_0 = tl.load(word_ptr + p, mask=m_e, other=0)
        b_1 = tl.load(word_ptr + p + edits, mask=_at(o_e, edits, left - CHUNK), other=0)
        b_2 = tl.load(word_ptr + p + 2 * edits, mask=_at(o_e, edits, left - 2 * CHUNK), other=0)
        b_3 = tl.load(word_ptr + p + 3 * edits, mask=_at(o_e, edits, left - 3 * CHUNK), other=0)
        for i in tl.static_range(4):
            b_word = b_0 if i == 0 else b_1 if i == 1 else b_2 if i == 2 else b_3
            m = _at(o_e, edits, left)
            tl.store(entry_ptr + p, _entry(b_register, b_first, b_bounded, column), mask=m)
            count = tl.minimum(tl.maximum(left, 0), CHUNK)
            b_register, b_first = _read_on(
                b_register, b_first, b_word, b_bounded, b_apart, column, count
            )
            column += CHUNK
            left -= CHUNK
            p += edits
    if state_ptr is not None:
        _state_out(
            state_ptr,
            i_s,
            o_e,
            m_e,
            edits,
            stride_row,
            stride_state,
            b_first,
            b_register,
            reaches_ptr is not None,
        )


@triton.jit(do_not_specialize=["tokens", "length", "sequences"])
def _arm_kernel(
    part_ptr,  # float32 [SPLITS, tokens, pitch]; part[0] becomes their sum
    word_ptr,  # int64 [chunks, edits]
    entry_ptr,  # int64 [chunks, edits]
    limits_ptr,
    reaches_ptr,
    gaps_ptr,
    cu_seqlens_ptr,
    state_ptr,  # its counts are read on
    tokens,
    length,
    sequences,
    edits,
    pitch,
    stride_row,
    SPLITS: tl.constexpr,
    BE: tl.constexpr,
):
    i_c = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < edits
    i_s, begin, start, end = _of_chunk(i_c, cu_seqlens_ptr, tokens, length, sequences)
    b_bounded, b_apart, b_window = _asked(limits_ptr, reaches_ptr, gaps_ptr, o_e, m_e)
    p = i_c * edits + o_e
    # A chunk that there is not holds what was there before, for none of its tokens.
    b_word = tl.load(word_ptr + p, mask=m_e, other=0)
    b_entry = tl.load(entry_ptr + p, mask=m_e, other=0)
    _arm(
        part_ptr,
        b_entry,
        b_word,
        b_bounded,
        b_apart,
        b_window,
        start,
        end,
        o_e,
        m_e,
        tokens,
        pitch,
        SPLITS,
    )
    if state_ptr is not None:
        # One program of each sequence, when all have read the count.
        if (tl.program_id(1) == 0) & (start == begin) & (start < end):
            p_count = state_ptr + i_s * stride_row
            tl.store(p_count, tl.load(p_count) + end - begin)


@triton.jit(do_not_specialize=["tokens", "length"])
def _short_kernel(
    part_ptr,  # float32 [SPLITS, tokens, pitch]; part[0] becomes their sum
    seen_ptr,  # float32 [SEEN_SPLITS, tokens, pitch_seen]
    limits_ptr,
    reaches_ptr,
    gaps_ptr,
    mask_ptr,
    state_ptr,  # all but its counts are read on
    tokens,
    length,  # at most CHUNK
    edits,
    pitch,
    pitch_seen,
    stride_row,
    stride_state,
    SPLITS: tl.constexpr,
    SEEN_SPLITS: tl.constexpr,
    BE: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1).to(tl.int64) * BE + tl.arange(0, BE)
    m_e = o_e < edits
    start = i_s * length
    end = start + length
    b_word = _word(
        seen_ptr, mask_ptr, limits_ptr, start, end, o_e, m_e, tokens, pitch_seen, SEEN_SPLITS
    )
    b_bounded, b_apart, b_window = _asked(limits_ptr, reaches_ptr, gaps_ptr, o_e, m_e)
    column = i_s * 0
    b_register = o_e * 0
    b_first = b_register + _NEVER
    if state_ptr is not None:
        column, b_first, b_register = _state_in(
            state_ptr, i_s, o_e, m_e, edits, stride_row, stride_state
        )
    b_entry = _entry(b_register, b_first, b_bounded, column)
    _arm(
        part_ptr,
        b_entry,
        b_word,
        b_bounded,
        b_apart,
        b_window,
        start,
        end,
        o_e,
        m_e,
        tokens,
        pitch,
        SPLITS,
    )
    if state_ptr is not None:
        b_register, b_first = _read_on(
            b_register, b_first, b_word, b_bounded, b_apart, column, length
        )
        _state_out(
            state_ptr,
            i_s,
            o_e,
            m_e,
            edits,
            stride_row,
            stride_state,
            b_first,
            b_register,
            reaches_ptr is not None,
        )
