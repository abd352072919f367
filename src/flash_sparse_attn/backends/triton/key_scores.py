"""Scores of keys from the hidden states of their tokens, and their gradients.

The weights of two linear layers are folded into one row per KV head, of which a score takes the
product with its token's hidden state. The bits of a score must not depend on the batch, the chunk
or where memory lies: compilers choose layouts by all of these, and sums of blocks are in the order
of the layout. So products are summed lane by lane, and the lanes in pairs, of which each sum is one
correctly rounded addition; forward kernels are compiled without contractions of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import row_offsets

_LOG2E, _LOG2E_REST, _LN2 = (
    tl.constexpr(1.4426950216293335),  # in fp32
    tl.constexpr(1.9259629911266175e-8),  # what that lacks
    tl.constexpr(0.6931471805599453),
)
_EXPONENT = tl.constexpr(150.0)  # beyond it exp is 0 or infinite
# Sizes and strides: their values compile no kernel anew.
_NUMBERS = (
    "num_tokens", "seq_len", "chunk_len", "num_chunks",
    "shb", "shs", "sgb", "sgh", "sgs", "svm", "sdh",
)  # fmt: skip


@triton.jit
def _sum_in_pairs(terms):
    """Sum the last of three dimensions, neighbours first. [A, B, N] -> [A, B]."""
    if terms.shape[2] == 1:
        return terms.reshape(terms.shape[0], terms.shape[1])
    else:
        pairs = terms.reshape(terms.shape[0], terms.shape[1], terms.shape[2] // 2, 2)
        return _sum_in_pairs(tl.sum(pairs, 3))


@triton.jit
def _exp(x):
    """exp, to a few units in the last place for large arguments as well."""
    x = tl.where(x < -_EXPONENT, -_EXPONENT, tl.where(x > _EXPONENT, _EXPONENT, x))  # NaN stays
    whole = x * _LOG2E
    rest = tl.fma(x, _LOG2E_REST, tl.fma(x, _LOG2E, -whole))
    return tl.exp2(whole) * tl.fma(rest, _LN2, 1.0)


@triton.jit
def _softplus(logit):
    """log(1 + exp(logit)), and exp(-|logit|)."""
    small = _exp(-tl.abs(logit))
    total = 1.0 + small
    # log1p: the quotient takes back what rounding did to the sum.
    added = total - 1.0
    log = tl.log(total) * small / tl.where(added == 0, 1.0, added)
    log = tl.where(added == 0, small, log)
    return tl.where(logit > 0, logit, tl.where(logit <= 0, 0.0, logit)) + log, small


@triton.jit
def _token_offsets(token, seq_len, stride_batch, stride_token, ALIGNED: tl.constexpr):
    """Where the row of each token begins, int64."""
    in_batch = row_offsets(token % seq_len, stride_token, ALIGNED)
    return row_offsets(token // seq_len, stride_batch, ALIGNED) + in_batch


@triton.jit
def _score_offsets(token, head, seq_len, HEADS_KV: tl.constexpr):
    """Where the score of each token and head lies in ``[B, Hkv, S]``. [TOKENS, HEADS]."""
    in_batch = token % seq_len
    offs = (token - in_batch).to(tl.int64) * HEADS_KV + in_batch
    return offs[:, None] + (head.to(tl.int64) * seq_len)[None, :]


@triton.jit
def _block_and_heads(i_program, HEADS_KV: tl.constexpr, HEADS: tl.constexpr):
    """The block of a program, its heads, and whether they are the first: neighbours have one block
    and share out the heads."""
    PROGRAMS: tl.constexpr = (HEADS_KV + HEADS - 1) // HEADS
    i_head = i_program % PROGRAMS
    return i_program // PROGRAMS, i_head * HEADS + tl.arange(0, HEADS), i_head == 0


@triton.jit
def _fold(
    i_program, ptr_v, ptr_v_bias, ptr_dt, ptr_dt_bias, ptr_folded, svm, sdh,
    HEADS_KV: tl.constexpr,
    VALUES: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Some columns of some heads of ``[Hkv, N]``, the product of both weights; then ``[Hkv]``,
    what biases make of it: column N of the product."""
    i_block, heads, _ = _block_and_heads(i_program, HEADS_KV, HEADS)
    head = heads[:, None, None]
    column = (i_block * BLOCK_N + tl.arange(0, BLOCK_N))[None, None, :]
    total = tl.zeros([HEADS, BLOCK_V, BLOCK_N], tl.float32)
    for start in range(0, VALUES, BLOCK_V):
        value = (start + tl.arange(0, BLOCK_V))[None, :, None]
        offs = value.to(tl.int64) * svm + column
        rows = tl.load(ptr_v + offs, mask=(value < VALUES) & (column < SIZE), other=0.0)
        rows = rows.to(tl.float32)
        if ptr_v_bias is not None:
            mask = (value < VALUES) & (column == SIZE)
            bias = tl.load(ptr_v_bias + value + column * 0, mask=mask, other=0.0)
            rows = tl.where(column == SIZE, bias.to(tl.float32), rows)
        mask = (value < VALUES) & (head < HEADS_KV)
        factor = tl.load(ptr_dt + head.to(tl.int64) * sdh + value, mask=mask, other=0.0)
        total = tl.fma(factor.to(tl.float32), rows, total)
    folded = _sum_in_pairs(tl.trans(total, 0, 2, 1))  # [HEADS, BLOCK_N]
    head, column = heads[:, None], (i_block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (head < HEADS_KV) & (column == SIZE)
    if ptr_dt_bias is not None:
        bias = tl.load(ptr_dt_bias + head + column * 0, mask=mask, other=0.0)
        folded += bias.to(tl.float32)
    tl.store(ptr_folded + head * SIZE + column, folded, mask=(head < HEADS_KV) & (column < SIZE))
    tl.store(ptr_folded + HEADS_KV * SIZE + head + column * 0, folded, mask=mask)


@triton.jit
def fold_kernel(
    ptr_v, ptr_v_bias, ptr_dt, ptr_dt_bias, ptr_folded, svm, sdh,
    HEADS_KV: tl.constexpr,
    VALUES: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (block of columns, heads)."""
    _fold(
        tl.program_id(0), ptr_v, ptr_v_bias, ptr_dt, ptr_dt_bias, ptr_folded, svm, sdh, HEADS_KV,
        VALUES, SIZE, HEADS, BLOCK_V, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def score_kernel(
    ptr_hidden, ptr_folded, ptr_rate, ptr_score, ptr_logit, num_tokens, seq_len, shb, shs,
    HEADS_KV: tl.constexpr,
    SIZE: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Scores, and logits if there is a place for them, of some tokens and heads. [Hkv, S]."""
    i_block, head, _ = _block_and_heads(tl.program_id(0), HEADS_KV, HEADS)
    token = i_block * TOKENS + tl.arange(0, TOKENS)
    offs = _token_offsets(token, seq_len, shb, shs, ALIGNED)[:, None, None]
    row = head[None, :, None] * SIZE
    live, exists = (token < num_tokens)[:, None, None], (head < HEADS_KV)[None, :, None]
    total = tl.zeros([TOKENS, HEADS, LANES], tl.float32)
    for start in tl.range(0, SIZE, LANES, num_stages=STAGES):
        column = (start + tl.arange(0, LANES))[None, None, :]
        inside = column < SIZE
        hidden = tl.load(ptr_hidden + offs + column, mask=live & inside, other=0.0)
        weight = tl.load(ptr_folded + row + column, mask=exists & inside, other=0.0)
        total = tl.fma(hidden.to(tl.float32), weight, total)
    logit = _sum_in_pairs(total)  # [TOKENS, HEADS]
    # Nothing moves: but every lane would go on with all sums it has.
    index = tl.broadcast_to(tl.arange(0, TOKENS)[:, None], TOKENS, HEADS)
    logit = tl.gather(logit, index, 0)
    exists = head < HEADS_KV
    logit += tl.load(ptr_folded + HEADS_KV * SIZE + head, mask=exists, other=0.0)[None, :]
    rate = tl.load(ptr_rate + head, mask=exists, other=0.0).to(tl.float32)
    softplus, _ = _softplus(logit)
    score = rate[None, :] * softplus
    if EXPONENTIAL:
        score = _exp(score)
    offs = _score_offsets(token, head, seq_len, HEADS_KV)
    mask = (token < num_tokens)[:, None] & exists[None, :]
    tl.store(ptr_score + offs, score, mask=mask)
    if ptr_logit is not None:
        tl.store(ptr_logit + offs, logit, mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def grad_logit_kernel(
    ptr_v, ptr_v_bias, ptr_dt, ptr_dt_bias, ptr_folded, ptr_rate, ptr_logit, ptr_grad,
    ptr_grad_logit, ptr_part, num_tokens, seq_len, chunk_len, sgb, sgh, sgs, svm, sdh,
    HEADS_KV: tl.constexpr,
    VALUES: tl.constexpr,
    SIZE: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PART: tl.constexpr,
    FOLDS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """The first `FOLDS` programs fold the weights again; every other takes a chunk of tokens and
    some heads: gradients of the logits ``[T, Hkv]`` and, behind the `WEIGHTS` of the `PART` numbers
    of the chunk, the sums of these and of what goes to the rates."""
    i_program = tl.program_id(0)
    if i_program < FOLDS:
        _fold(
            i_program, ptr_v, ptr_v_bias, ptr_dt, ptr_dt_bias, ptr_folded, svm, sdh, HEADS_KV,
            VALUES, SIZE, HEADS, BLOCK_V, BLOCK_N,
        )  # fmt: skip
    else:
        i_chunk, head, _ = _block_and_heads(i_program - FOLDS, HEADS_KV, HEADS)
        exists = head < HEADS_KV
        rate = tl.load(ptr_rate + head, mask=exists, other=0.0).to(tl.float32)[None, :]
        offset_sum = tl.zeros([TOKENS, HEADS], tl.float32)
        rate_sum = tl.zeros([TOKENS, HEADS], tl.float32)
        first = i_chunk * chunk_len
        for start in range(first, tl.minimum(first + chunk_len, num_tokens), TOKENS):
            token = start + tl.arange(0, TOKENS)
            mask = (token < num_tokens)[:, None] & exists[None, :]
            offs = _score_offsets(token, head, seq_len, HEADS_KV)
            logit = tl.load(ptr_logit + offs, mask=mask, other=0.0)
            offs = _token_offsets(token, seq_len, sgb, sgs, False)[:, None]
            offs += head.to(tl.int64)[None, :] * sgh
            grad = tl.load(ptr_grad + offs, mask=mask, other=0.0)
            softplus, small = _softplus(logit)
            if EXPONENTIAL:
                grad = tl.where(mask, grad * _exp(rate * softplus), 0.0)
            rate_sum += grad * softplus
            grad *= rate * tl.where(logit < 0, small, 1.0) / (1.0 + small)
            offset_sum += grad
            offs = token.to(tl.int64)[:, None] * HEADS_KV + head[None, :]
            tl.store(ptr_grad_logit + offs, grad, mask=mask)
        if ptr_part is not None:
            ptrs = ptr_part + i_chunk.to(tl.int64) * PART + WEIGHTS + head
            tl.store(ptrs, tl.sum(offset_sum, 0), mask=exists)
            tl.store(ptrs + HEADS_KV, tl.sum(rate_sum, 0), mask=exists)


@triton.jit(do_not_specialize=_NUMBERS)
def grad_kernel(
    ptr_hidden, ptr_folded, ptr_grad_logit, ptr_grad_hidden, ptr_part, num_tokens, seq_len,
    chunk_len, shb, shs,
    HEADS_KV: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PART: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """A chunk of tokens, some columns and some heads: the chunk's part of the gradient of the
    folded weight, and by the programs of the first heads the gradient of the hidden states."""
    COLUMNS: tl.constexpr = (SIZE + LANES - 1) // LANES
    i_block, head, is_first = _block_and_heads(tl.program_id(0), HEADS_KV, HEADS)
    i_chunk = i_block // COLUMNS
    # [TOKENS, HEADS, LANES]
    column = (i_block % COLUMNS * LANES + tl.arange(0, LANES))[None, None, :]
    inside, exists = column < SIZE, (head < HEADS_KV)[None, :, None]
    weight_grad = tl.zeros([TOKENS, HEADS, LANES], tl.float32)
    first = i_chunk * chunk_len
    for start in range(first, tl.minimum(first + chunk_len, num_tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        live = (token < num_tokens)[:, None, None]
        ptr_row = ptr_grad_logit + (token.to(tl.int64) * HEADS_KV)[:, None, None]
        if WEIGHTS > 0:
            offs = _token_offsets(token, seq_len, shb, shs, ALIGNED)[:, None, None]
            hidden = tl.load(ptr_hidden + offs + column, mask=live & inside, other=0.0)
            grad = tl.load(ptr_row + head[None, :, None], mask=live & exists, other=0.0)
            weight_grad = tl.fma(grad, hidden.to(tl.float32), weight_grad)
        if ptr_grad_hidden is not None and is_first:
            hidden_grad = tl.zeros([TOKENS, 1, LANES], tl.float32)
            for other in range(0, HEADS_KV, HEADS):
                for step in tl.static_range(HEADS):  # written out, they keep the layout of above
                    i = other + step
                    mask = inside & (i < HEADS_KV)
                    weight = tl.load(ptr_folded + i * SIZE + column, mask=mask, other=0.0)
                    factor = tl.load(ptr_row + i, mask=live & (i < HEADS_KV), other=0.0)
                    hidden_grad = tl.fma(factor, weight, hidden_grad)
            ptrs = ptr_grad_hidden + (token.to(tl.int64) * SIZE)[:, None, None] + column
            tl.store(ptrs, hidden_grad.to(ptr_grad_hidden.dtype.element_ty), mask=live & inside)
    if WEIGHTS > 0:
        ptrs = ptr_part + i_chunk.to(tl.int64) * PART + head[None, :, None] * SIZE + column
        tl.store(ptrs, tl.sum(weight_grad, 0, keep_dims=True), mask=exists & inside)


@triton.jit(do_not_specialize=_NUMBERS)
def sum_kernel(
    ptr_part, ptr_sum, ptr_grad_dt_bias, ptr_grad_rate, num_chunks,
    HEADS_KV: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Some of the sums over all chunks, in order: of the folded weight, the offset and the rate."""
    column = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros([CHUNKS, LANES], tl.float32)
    for start in range(0, num_chunks, CHUNKS):
        chunk = (start + tl.arange(0, CHUNKS))[:, None]
        mask = (chunk < num_chunks) & (column < WEIGHTS + 2 * HEADS_KV)[None, :]
        ptrs = ptr_part + chunk.to(tl.int64) * PART + column[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0)
    sums = tl.sum(total, 0)
    tl.store(ptr_sum + column, sums, mask=column < WEIGHTS + HEADS_KV)
    head = column - WEIGHTS
    if ptr_grad_dt_bias is not None:
        grad = sums.to(ptr_grad_dt_bias.dtype.element_ty)
        tl.store(ptr_grad_dt_bias + head, grad, mask=(head >= 0) & (head < HEADS_KV))
    head -= HEADS_KV
    if ptr_grad_rate is not None:
        grad = sums.to(ptr_grad_rate.dtype.element_ty)
        tl.store(ptr_grad_rate + head, grad, mask=(head >= 0) & (head < HEADS_KV))


@triton.jit
def unfold_kernel(
    ptr_v, ptr_v_bias, ptr_dt, ptr_sum, ptr_grad_v, ptr_grad_v_bias, ptr_grad_dt, svm, sdh,
    HEADS_KV: tl.constexpr,
    VALUES: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Some values and heads: the gradient of the weight of the second layer, and by the programs of
    the first heads that of the first layer, from those of the folded weight and offset."""
    i_block, head, is_first = _block_and_heads(tl.program_id(0), HEADS_KV, HEADS)
    values = i_block * BLOCK_V + tl.arange(0, BLOCK_V)
    value = values[:, None]
    # [BLOCK_V, HEADS, LANES]
    row = head[None, :, None] * SIZE
    exists = (head < HEADS_KV)[None, :, None]
    total = tl.zeros([BLOCK_V, HEADS, LANES], tl.float32)
    ptr_factor = ptr_dt + value[:, :, None]
    for start in range(0, SIZE, LANES):
        column = (start + tl.arange(0, LANES))[None, None, :]
        inside = (value < VALUES)[:, :, None] & (column < SIZE)
        offs = value.to(tl.int64)[:, :, None] * svm + column
        if ptr_grad_dt is not None:
            rows = tl.load(ptr_v + offs, mask=inside, other=0.0).to(tl.float32)
            sums = tl.load(ptr_sum + row + column, mask=exists & (column < SIZE), other=0.0)
            total = tl.fma(rows, sums, total)
        if ptr_grad_v is not None and is_first:
            grad = tl.zeros([BLOCK_V, 1, LANES], tl.float32)
            for other in range(0, HEADS_KV, HEADS):
                for step in tl.static_range(HEADS):
                    i = other + step
                    mask = (value < VALUES)[:, :, None] & (i < HEADS_KV)
                    factor = tl.load(ptr_factor + i * sdh, mask=mask, other=0.0)
                    mask = (column < SIZE) & (i < HEADS_KV)
                    more = tl.load(ptr_sum + i * SIZE + column, mask=mask, other=0.0)
                    grad = tl.fma(factor.to(tl.float32), more, grad)
            ptrs = ptr_grad_v + (value.to(tl.int64) * SIZE)[:, :, None] + column
            tl.store(ptrs, grad.to(ptr_grad_v.dtype.element_ty), mask=inside)
    if ptr_grad_dt is not None:
        mask = (values < VALUES)[:, None] & (head < HEADS_KV)[None, :]
        dt_grad = tl.sum(total, 2)
        if ptr_v_bias is not None:
            bias = tl.load(ptr_v_bias + values, mask=values < VALUES, other=0.0).to(tl.float32)
            offset = tl.load(ptr_sum + WEIGHTS + head, mask=head < HEADS_KV, other=0.0)
            dt_grad = tl.fma(bias[:, None], offset[None, :], dt_grad)
        ptrs = ptr_grad_dt + (head * VALUES)[None, :] + value
        tl.store(ptrs, dt_grad.to(ptr_grad_dt.dtype.element_ty), mask=mask)
    if ptr_grad_v_bias is not None and is_first:
        bias_grad = tl.zeros([BLOCK_V], tl.float32)
        for i in range(HEADS_KV):
            weight = tl.load(ptr_dt + i * sdh + values, mask=values < VALUES, other=0.0)
            part = tl.load(ptr_sum + WEIGHTS + i)
            bias_grad = tl.fma(weight.to(tl.float32), part, bias_grad)
        bias_grad = bias_grad.to(ptr_grad_v_bias.dtype.element_ty)
        tl.store(ptr_grad_v_bias + values, bias_grad, mask=values < VALUES)
