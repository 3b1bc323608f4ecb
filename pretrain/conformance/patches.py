"""Laws of a model whose patches follow the data. Models without rules obey them all."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pretrain.conformance.subject import Subject, require
from pretrain.estimate.patches import patch_costs, slots_of
from pretrain.evaluation.patches.finding import Starts, by_bytes
from pretrain.models import ByteModel
from pretrain.models.patching.patcher import Patcher
from pretrain.models.patching.watching import recorded


def check_patches(subject: Subject, folder: Path) -> None:
    """Check that where patches start depends on earlier bytes of the row alone, and that the model names its rules."""
    model, length = subject.build(torch.float64), subject.sequence_length
    rules = {id(module) for module in model.modules() if isinstance(module, Patcher)}
    patchers = model.patchers()
    require(rules == set(map(id, patchers.values())), "patchers() names other rules than the modules of the model")
    require(
        list(patchers) == [str(number) for number in range(len(patchers))],
        f"patchers() has the stages {list(patchers)}, which are not numbered from 0",
    )
    if not patchers:
        return
    letters = torch.tensor(list(b"abc "))
    words = letters[subject.ids(1) % len(letters)]
    ids = torch.cat([words, subject.ids(2), subject.short_documents(1)])
    before = starts_of(model, ids)
    for stage, starts in before.items():
        require(bool(starts[:, 0].all()), f"no patch of stage {stage} starts at position 0")
    for changed in sorted({0, 1, length // 3, length // 2, length - 2} & set(range(length))):
        other = ids.clone()
        other[0, changed] = letters[0] if ids[0, changed] == letters[-1] else letters[-1]
        for cut, name in ((other, "row with another byte"), (ids[:, : changed + 1], "prefix to byte")):
            for stage, starts in starts_of(model, cut).items():
                early = (starts != before[stage][:, : starts.shape[1]])[:, : changed + 1].nonzero()[1].tolist()
                require(not early, f"a {name} {changed} has other starts of stage {stage} at positions {early}")
                require(
                    np.array_equal(starts[1:, : changed + 1], before[stage][1:, : changed + 1]),
                    f"byte {changed} of row 0 changes where patches of another row start",
                )


def check_useful_flops(subject: Subject, folder: Path) -> None:
    """Check that `useful_flops` is `flops` of a model with no more patches than are used."""
    model, length = subject.build(), subject.sequence_length
    patchers = list(model.patchers().values())
    if not patchers:
        return
    slots = slots_of(model)
    for cost in patch_costs(model, [4.0, 8.0]):
        counts = [max(1, round(count)) for count in cost.patches]
        useful = model.useful_flops(length, counts)
        for patcher, count in zip(patchers, counts, strict=True):
            patcher.capacity = count
        full = model.flops(length)
        require(
            round(useful) == full,
            f"useful_flops of {counts} patches is {useful}, and flops with no room for more {full}",
        )
        for patcher, count in zip(patchers, slots, strict=True):
            patcher.capacity = count


def check_activations(subject: Subject, folder: Path) -> None:
    """Check that a training pass keeps as many bytes for any ids, so that a rehearsal on constant ids measures them."""
    model = subject.build().train()
    if not model.patchers():
        return
    empty, _ = model.empty_example(2, torch.device("cpu"))
    expected, kept = bytes_kept(model, empty), bytes_kept(model, subject.ids(2))
    require(kept == expected, f"a training pass keeps {kept:,} bytes, and {expected:,} bytes on constant ids")


def bytes_kept(model: ByteModel, ids: Tensor) -> int:
    """Return the bytes of all tensors that a forward pass keeps for the backward pass."""
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        total += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids)
    return total


def starts_of(model: ByteModel, ids: Tensor) -> Starts:
    """Return where patches start in a pass over ids, by stage, for each byte.

    Raises:
        BrokenLawError: the pass does not call each rule with all positions.
    """
    width = ids.shape[1]
    with torch.no_grad(), recorded(model.patchers()) as seen:
        model(ids)
    for stage, patcher in model.patchers().items():
        require(stage in seen, f"a forward pass does not call the rule of stage {stage} as a module")
        found = tuple(seen[stage].starts.shape)
        require(found == (len(ids), width), f"the rule of stage {stage} is called for {found}, not {(len(ids), width)}")
        width = min(width, patcher.capacity)
    return by_bytes(seen)
