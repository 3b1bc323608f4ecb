"""Dealing of a global batch to ranks.

global batch      the first global_batch sequences from g on that are not skipped
micro-batch i     the i-th group of `micro_batch` of them (the last may be shorter)
rank r of W       micro-batches r, r + W, r + 2W, …
"""


def deal(global_batch: int, micro_batch: int, rank: int, world_size: int) -> dict[int, range]:
    """Return the rows of the global batch that each micro-batch of a rank has, by the number of the micro-batch.

    Args:
        global_batch: rows of an optimizer step, over all ranks.
        micro_batch: rows of a forward pass.
        rank: of the process.
        world_size: number of ranks. Rank 0 has no fewer micro-batches than any other.
    """
    return {
        index: range(index * micro_batch, min((index + 1) * micro_batch, global_batch))
        for index in range(rank, -(-global_batch // micro_batch), world_size)
    }
