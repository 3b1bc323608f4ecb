"""Bits per byte by place in the word, of several models on the same text.

python benchmarks/words.py FILE RUN [RUN ...] [--bytes N]

Place 0 is a spacelike byte (SpaceByte's rule: no letter, digit or continuation of UTF-8), and a word begins at place 1.
Each window of the model stands alone.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import byteloom
from pretrain.models.patching.rules import is_spacelike

LAST = 5
"""Place that stands for all later ones too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="text")
    parser.add_argument("runs", nargs="+", help="runs, checkpoints or exports")
    parser.add_argument("--bytes", type=int, default=150_000, help="bytes of the text that are scored")
    chosen = parser.parse_args()
    with chosen.file.open("rb") as file:
        data = file.read(chosen.bytes)
    places = places_in_words(np.frombuffer(data, np.uint8)).clip(max=LAST)
    bits = [np.array(byteloom.load(run).bits(data, mode="windows")) for run in chosen.runs]
    print(f"| place | share of bytes | {' | '.join(Path(run).name for run in chosen.runs)} |")
    print("| --- " * (2 + len(bits)) + "|")
    for place in np.unique(places):
        here = places == place
        name = f"{place} and later" if place == LAST else place
        print(f"| {name} | {here.mean():.3f} | {' | '.join(f'{each[here].mean():.3f}' for each in bits)} |")


def places_in_words(data: np.ndarray) -> np.ndarray:
    """Return the bytes since the last spacelike byte, 0 at such a byte; the text begins a word."""
    spacelike = is_spacelike(torch.from_numpy(data.astype(np.int64))).numpy()
    index = np.arange(len(data))
    return index - np.maximum.accumulate(np.where(spacelike, index, -1))


if __name__ == "__main__":
    main()
