"""Triton kernels of the attention statistics.

All sequences of a batch share a launch. A program reads its work from two int32 tables:

- `sequences`: batch row, first query slot, queries, first key slot, keys;
- `items`: sequence, first row, row after the last, first key, key after the last, part, output
  head, workspace offset, workspace width, place of the first row among the row sums. Rows and keys
  count from the start of the sequence.

Rows of results are numbered `batch row * query_slots + query slot`. Exponentials are base 2: their
factor is folded into the scale. Comparisons are written so that a NaN survives them.
"""

# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
SEQUENCE_COLUMNS = tl.constexpr(5)
ITEM_COLUMNS = tl.constexpr(10)
# Row sums per part: mass, p log2 p, distance, local mass, largest, fixed mass and p log2 p, N_t.
SUMS = tl.constexpr(8)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The smallest normal float32: `p log p` of a zero weight must be zero.
TINY = tl.constexpr(1.1754943508222875e-38)
# Below every score, yet finite: it cannot make a NaN.
HIDDEN = tl.constexpr(-1.0e38)


@triton.jit
def _logit(score, scale, softcap):
    """Base-2 logits, `softcap * tanh(score * scale / softcap)` where there is a softcap."""
    if softcap is None:
        logit = score * (scale * LOG2E)
    else:
        ratio = score * (scale / softcap)
        square = ratio * ratio
        # 1 - 2 / (e^2x + 1) loses the digits of a small x; there the series is exact to float32.
        series = ratio * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
        quotient = 1.0 - 2.0 / (tl.exp2(ratio * (2 * LOG2E)) + 1.0)
        logit = tl.where(square < 0.0625, series, quotient) * (softcap * LOG2E)
    return logit


@triton.jit
def _work(items, sequences):
    """Rows and keys of this program; batch row, slots, keys before the queries, and all keys."""
    item = items + tl.program_id(0) * ITEM_COLUMNS
    sequence = sequences + tl.load(item) * SEQUENCE_COLUMNS
    rows = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    slots = tl.load(sequence), tl.load(sequence + 1), tl.load(sequence + 3)
    keys = tl.load(sequence + 4)
    return rows + slots + (keys - tl.load(sequence + 2), keys)


@triton.jit
def _tile(
    tensor,
    strides,
    batch,
    head,
    slot,
    last,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Vectors of consecutive slots; by pointers, those after the first and `last` repeat it."""
    if strides is None:
        tile = tensor.load([batch, head, slot, 0]).reshape(TOKENS, BLOCK_DIM)
    else:
        start = tensor + tl.cast(batch, tl.int64) * strides[0]
        start += tl.cast(head, tl.int64) * strides[1] + tl.cast(slot, tl.int64) * strides[2]
        dim = tl.arange(0, BLOCK_DIM)[None, :]
        start += tl.minimum(tl.arange(0, TOKENS), last)[:, None] * strides[2] + dim
        if DIM == BLOCK_DIM:
            tile = tl.load(start)
        else:
            tile = tl.load(start, mask=dim < DIM, other=0.0)
    return tile


@triton.jit
def _pairs(position, column, key_stop, window, CAUSAL: tl.constexpr):
    """Distances from these keys to these queries, and whether the queries see them."""
    distance = position[:, None] - column[None, :]
    visible = column[None, :] < key_stop
    if CAUSAL:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < window
    return distance, visible


@triton.jit
def log_sum_exp(
    query,
    key,
    sinks,
    lse,
    sequences,
    items,
    query_strides,
    key_strides,
    query_slots,
    all_rows,
    group,
    scale,
    softcap,
    window,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Natural log of the softmax denominators, `heads row`: one program per row block and head.

    Only tiles at the edge of the window and those at the diagonal, or with the last keys, are
    masked: the tiles between have a loop of their own. The scale is positive.
    """
    first_row, row_stop, first_key, key_stop, batch, query_slot, key_slot, before, keys = _work(
        items, sequences
    )
    head = tl.program_id(1)
    row = tl.arange(0, BLOCK_ROWS)
    slot, last = query_slot + first_row, row_stop - first_row - 1
    position = before + first_row + row
    q = _tile(query, query_strides, batch, head, slot, last, BLOCK_ROWS, DIM, BLOCK_DIM)
    # Softcapped logits are scaled one by one.
    factor = scale * LOG2E if softcap is None else 1.0
    edge, diagonal = first_key, key_stop
    if window is not None:
        hidden = tl.maximum(before + row_stop - window - first_key, 0)
        edge = tl.minimum(first_key + tl.cdiv(hidden, BLOCK_KEYS) * BLOCK_KEYS, key_stop)
    if CAUSAL:
        diagonal = tl.minimum(diagonal, before + first_row + 1)
    diagonal = tl.maximum(edge, first_key + (diagonal - first_key) // BLOCK_KEYS * BLOCK_KEYS)
    borders = first_key, edge, diagonal, key_stop

    largest = tl.full([BLOCK_ROWS], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for stretch in tl.static_range(1 if window is None else 0, 3):
        for start in range(borders[stretch], borders[stretch + 1], BLOCK_KEYS):
            k = _tile(
                key,
                key_strides,
                batch,
                head // group,
                key_slot + start,
                keys - 1 - start,
                BLOCK_KEYS,
                DIM,
                BLOCK_DIM,
            )
            logit = tl.dot(q, tl.trans(k), input_precision="ieee")
            if softcap is not None:
                logit = _logit(logit, scale, softcap)
            if stretch != 1:
                column = start + tl.arange(0, BLOCK_KEYS)
                _, visible = _pairs(position, column, key_stop, window, CAUSAL)
                logit = tl.where(visible, logit, HIDDEN)
            new = tl.maximum(largest, tl.max(logit, axis=1) * factor)
            power = tl.exp2(logit * factor - new[:, None])
            total = total * tl.exp2(largest - new) + tl.sum(power, axis=1)
            largest = new
    if sinks is not None:
        # A sink that overflows here leaves its head no weight, which is then exact.
        total += tl.exp2(tl.load(sinks + head) * LOG2E - largest)
    out = tl.cast(head, tl.int64) * all_rows + batch * query_slots + slot + row
    tl.store(lse + out, (largest + tl.log2(total)) * LN2, mask=row <= last)


@triton.jit
def mean_weights(
    query,
    key,
    lse,
    sums,
    workspace,
    sequences,
    items,
    query_strides,
    key_strides,
    query_slots,
    all_rows,
    group,
    sum_rows,
    scale,
    softcap,
    window,
    fixed_k,
    local_window,
    distance_bound,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    OVERLAPPED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Row sums over the head-averaged weights of a block of rows and a range of keys.

    `HEADS` heads are averaged, from `output head * HEADS` on. `SHARED` heads in a row have one key
    head and one load of its keys. `OVERLAPPED` takes the exponentials of a head while the product
    of the next one runs. Weights are written to the workspace if there is one; a `local_window`
    asks for distances, up to a `distance_bound`, the largest weight and local mass, a `fixed_k`
    for sums over first keys.
    """
    item = items + tl.program_id(0) * ITEM_COLUMNS
    first_row, row_stop, first_key, key_stop, batch, query_slot, key_slot, before, keys = _work(
        items, sequences
    )
    part, out_head = tl.load(item + 5), tl.load(item + 6)
    row = tl.arange(0, BLOCK_ROWS)
    slot, last = query_slot + first_row, row_stop - first_row - 1
    live, real = row <= last, tl.minimum(row, last)
    position = before + first_row + row
    denominators = lse + batch * query_slots + slot
    first_visible = tl.zeros([BLOCK_ROWS], tl.int32)
    if window is not None:
        first_visible = tl.maximum(position - window + 1, 0)

    zero = tl.zeros([BLOCK_ROWS], tl.float32)
    mass, plogp, far, local, largest, fixed_mass, fixed_plogp = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
    for start in range(first_key, key_stop, BLOCK_KEYS):
        mean = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        # What is overlapped lags by a head: before the first one there is no weight.
        lagging, shift = mean, tl.full([BLOCK_ROWS], -HIDDEN, tl.float32)
        for step in range(0, HEADS // SHARED):
            first_head = out_head * HEADS + step * SHARED
            k = tl.trans(
                _tile(
                    key,
                    key_strides,
                    batch,
                    first_head // group,
                    key_slot + start,
                    keys - 1 - start,
                    BLOCK_KEYS,
                    DIM,
                    BLOCK_DIM,
                )
            )
            for member in range(0, SHARED):
                head = first_head + member
                q = _tile(query, query_strides, batch, head, slot, last, BLOCK_ROWS, DIM, BLOCK_DIM)
                score = tl.dot(q, k, input_precision="ieee")
                place = denominators + tl.cast(head, tl.int64) * all_rows
                denominator = tl.load(place + real) * LOG2E
                if OVERLAPPED:
                    lagging, score = score, lagging
                    shift, denominator = denominator, shift
                mean += tl.exp2(_logit(score, scale, softcap) - denominator[:, None])
        if OVERLAPPED:
            mean += tl.exp2(_logit(lagging, scale, softcap) - shift[:, None])
        # One mask per tile, not per head; it also drops infinities of keys after the query.
        column = start + tl.arange(0, BLOCK_KEYS)
        distance, visible = _pairs(position, column, key_stop, window, CAUSAL)
        mean = tl.where(visible, mean * (1.0 / HEADS), 0.0)
        term = mean * tl.log2(tl.maximum(mean, TINY))
        mass += tl.sum(mean, axis=1)
        plogp += tl.sum(term, axis=1)
        if workspace is not None:
            # Rows are as wide as whole tiles, so no column has to be masked.
            place = (row * tl.load(item + 8))[:, None] + column[None, :]
            tl.store(workspace + tl.load(item + 7) + place, mean, mask=live[:, None])
        if local_window is not None:
            if not CAUSAL:
                distance = tl.abs(distance)
            local += tl.sum(tl.where(distance < local_window, mean, 0.0), axis=1)
            if distance_bound is not None:
                distance = tl.minimum(distance, distance_bound)
            far += tl.sum(mean * distance, axis=1)
            largest = tl.maximum(largest, tl.max(mean, axis=1))
        if fixed_k is not None:
            first = column[None, :] < (first_visible + fixed_k)[:, None]
            fixed_mass += tl.sum(tl.where(first, mean, 0.0), axis=1)
            fixed_plogp += tl.sum(tl.where(first, term, 0.0), axis=1)

    stride = tl.cast(sum_rows, tl.int64)
    found = sums + part * SUMS * stride + tl.load(item + 9) + real
    tl.store(found, mass, mask=live)
    tl.store(found + stride, plogp, mask=live)
    if local_window is not None:
        tl.store(found + 2 * stride, far, mask=live)
        tl.store(found + 3 * stride, local, mask=live)
        tl.store(found + 4 * stride, largest, mask=live)
    if fixed_k is not None:
        tl.store(found + 5 * stride, fixed_mass, mask=live)
        tl.store(found + 6 * stride, fixed_plogp, mask=live)
    if part == 0:
        count = tl.zeros([BLOCK_ROWS], tl.int32) + keys
        if CAUSAL:
            count = position - first_visible + 1
        tl.store(found + 7 * stride, count.to(tl.float32), mask=live)


@triton.jit
def selections(
    workspace,
    rests,
    entropy,
    sizes,
    sequences,
    items,
    query_slots,
    all_rows,
    top_k,
    window,
    TARGETS: tl.constexpr,
    SLOTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Entropy of the `top_k` largest weights, and how many of the largest hold a share of the mass.

    Non-negative floats are ordered as their bits are, so halving an interval of bit patterns finds
    the exact weight at which a count or a mass is reached; ties are counted, not listed. With
    `top_k` the first target is the count. The others are what shares leave of the mass: the sum of
    the smallest weights, which rounds less than that of the largest.
    """
    item = items + tl.program_id(0) * ITEM_COLUMNS
    first_row, row_stop, first_key, key_stop, batch, query_slot, _, before, keys = _work(
        items, sequences
    )
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < row_stop - first_row
    # A block of fewer rows than programs leaves some with nothing to do: they repeat the last row.
    real = tl.minimum(row, row_stop - first_row - 1)
    start = workspace + tl.load(item + 7) + real * tl.load(item + 8)
    lane = first_key + tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)[None, :]

    mass = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    # Where nothing is left to load, a zero adds nothing and is below every threshold that counts.
    weight = tl.load(start[:, None] + lane[None, :], mask=lane[None, :] < key_stop, other=0.0)
    for piece in range(PIECES):
        if PIECES > 1:
            column = lane + piece * BLOCK
            weight = tl.load(start[:, None] + column[None, :], mask=column < key_stop, other=0.0)
        mass += tl.sum(weight, axis=1)
        largest = tl.maximum(largest, tl.max(weight, axis=1))
    rest = tl.load(rests + slot)
    target = -rest * mass[:, None]
    if top_k is not None:
        target = tl.where(slot == 0, tl.cast(top_k, tl.float32), target)

    low = tl.zeros([ROWS, SLOTS], tl.int32)
    high = tl.zeros([ROWS, SLOTS], tl.int32) + (largest.to(tl.int32, bitcast=True) + 1)[:, None]
    # Weights are at most one up to rounding: their bits are below 2^30.
    for _ in range(30):
        middle = low + (high - low) // 2
        level = middle.to(tl.float32, bitcast=True)
        reached = tl.zeros([ROWS, SLOTS], tl.float32)
        for piece in range(PIECES):
            if PIECES > 1:
                column = lane + piece * BLOCK
                weight = tl.load(
                    start[:, None] + column[None, :], mask=column < key_stop, other=0.0
                )
            for index in tl.static_range(TARGETS):
                bound = tl.sum(tl.where(slot == index, level, 0.0), axis=1)
                kept = weight >= bound[:, None]
                if index == 0 and top_k is not None:
                    value = tl.sum(tl.where(kept, 1.0, 0.0), axis=1)
                else:
                    value = -tl.sum(tl.where(kept, 0.0, weight), axis=1)
                reached += tl.where(slot == index, value[:, None], 0.0)
        enough = reached >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)

    bound = low.to(tl.float32, bitcast=True)
    count = tl.zeros([ROWS, SLOTS], tl.float32)
    beyond = tl.zeros([ROWS, SLOTS], tl.float32)
    plogp = tl.zeros([ROWS], tl.float32)
    for piece in range(PIECES):
        if PIECES > 1:
            column = lane + piece * BLOCK
            weight = tl.load(start[:, None] + column[None, :], mask=column < key_stop, other=0.0)
        for index in tl.static_range(TARGETS):
            here = tl.sum(tl.where(slot == index, bound, 0.0), axis=1)
            more = tl.sum(tl.where(weight > here[:, None], 1.0, 0.0), axis=1)
            count += tl.where(slot == index, more[:, None], 0.0)
            if index == 0 and top_k is not None:
                part = tl.where(weight > here[:, None], weight, 0.0)
                plogp += tl.sum(part * tl.log2(tl.maximum(part, TINY)), axis=1)
            else:
                part = tl.where(weight <= here[:, None], weight, 0.0)
            beyond += tl.where(slot == index, tl.sum(part, axis=1)[:, None], 0.0)

    out = batch * query_slots + query_slot + first_row + real
    out += tl.load(item + 6) * all_rows
    visible = tl.zeros([ROWS], tl.int32) + keys
    if CAUSAL:
        visible = before + first_row + real + 1
    if window is not None:
        visible = tl.minimum(visible, window)
    if top_k is not None:
        ties = tl.cast(top_k, tl.float32) - tl.sum(tl.where(slot == 0, count, 0.0), axis=1)
        tie = tl.sum(tl.where(slot == 0, bound, 0.0), axis=1)
        kept_mass = tl.sum(tl.where(slot == 0, beyond, 0.0), axis=1) + ties * tie
        plogp += ties * tie * tl.log2(tl.maximum(tie, TINY))
        value = (tl.log2(kept_mass) - plogp / kept_mass) * LN2
        most = tl.log2(tl.minimum(visible, top_k).to(tl.float32)) * LN2
        value = tl.where(value < 0.0, 0.0, tl.where(value > most, most, value))
        tl.store(entropy + out, value, mask=live)
    missing = tl.ceil((beyond + target) / tl.maximum(bound, TINY))
    # A weight may underflow to zero: all of the mass is all that is visible.
    most_keys = visible.to(tl.float32)[:, None]
    size = tl.where(target < 0.0, tl.maximum(count + missing, 1.0), most_keys)
    size = tl.minimum(size, most_keys)
    wanted = slot
    shares_asked = TARGETS
    if top_k is not None:
        wanted = slot - 1
        shares_asked = TARGETS - 1
    inside = live[:, None] & (wanted >= 0) & (wanted < shares_asked)
    place = sizes + (out * shares_asked)[:, None] + wanted
    tl.store(place, size.to(tl.int32), mask=inside)
