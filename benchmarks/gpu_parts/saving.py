"""Part saving: a checkpoint is written while steps continue."""

import tempfile
import time
from collections.abc import Iterator

import torch

from gpu_parts import Row, Setting
from gpu_parts.models import batch_of, engine_of, recipe_model
from pretrain.checkpoint import CheckpointStore

RECIPE = "megabyte/text"


def rows(setting: Setting) -> Iterator[Row]:
    """Yield times of steps with and without a save, the stall, pinned memory, and times of writing and reading."""
    config = recipe_model(setting, RECIPE)
    engine = engine_of(setting, config)
    batch = batch_of(config)

    def step(store: CheckpointStore | None = None) -> float:
        before = (lambda: None) if store is None else store.wait_for_copy
        setting.synchronize()
        begin = time.perf_counter()
        engine.train_step(batch, step=0, learning_rate=1e-5, before_update=before)
        setting.synchronize()
        return time.perf_counter() - begin

    step()
    alone = min(step() for _ in range(3))
    fragments = engine.owned_fragments()
    size = 4 * sum(len(fragment.data) for fragment in fragments)
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        store = CheckpointStore(folder, keep=1)
        for number in (1, 2):  # the first save allocates its memory
            pinned, values = _pinned_bytes(setting), [fragment.data.clone() for fragment in fragments]
            setting.synchronize()
            begin = time.perf_counter()
            store.begin(number, fragments, {"counters": engine.counters()})
            started = time.perf_counter() - begin
            during = step(store)
            store.finish()
            written = time.perf_counter() - begin
            stall = started + max(during - alone, 0)
            title = f"save {number}: {size / 2**30:.3g} GiB"
            yield Row(f"{title}: stall of the loop", stall, "s", f"a step alone takes {alone:.3g} s")
            yield Row(f"{title}: written and durable", size / written / 2**30, "GiB/s", f"{written:.3g} s")
            if setting.is_cuda:
                yield Row(
                    f"{title}: pinned memory", (_pinned_bytes(setting) - pinned) / 2**30, "GiB", "more than before"
                )
        begin = time.perf_counter()
        metadata = CheckpointStore(folder, keep=1).load(lambda _: engine.fragments())
        setting.synchronize()
        seconds = time.perf_counter() - begin
        assert metadata is not None
        yield Row("load, verified", size / seconds / 2**30, "GiB/s", f"{seconds:.3g} s")
        same = all(torch.equal(value, f.data) for value, f in zip(values, fragments, strict=True))
        yield Row("the update waited for the copy", None, "", "the checkpoint has the values before it", same)


def _pinned_bytes(setting: Setting) -> int:
    """Return the bytes of pinned memory that torch holds."""
    if not setting.is_cuda:
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))
