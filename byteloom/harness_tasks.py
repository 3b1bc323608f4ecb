"""Tasks for lm_eval about bytes, made of any text: case, typos, and spelling in the manner of CUTE.

    text ─▶ passages ─▶ clean, lower, upper, typos            bits per byte of the same passages
         ─▶ words    ─▶ spell, unspell, contains, delete,     accuracy among four answers, after four examples
                        insert, substitute, swap
                        spell_freely                          exact match of a generated answer

The questions about spelling are in the manner of CUTE (Edman, Schmid and Fraser 2024, arXiv:2409.15452), with words of
the text. A folder has a YAML file and a JSON Lines file for each task; `--include_path FOLDER` names it to lm_eval.
"""

import json
import random
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from byteloom.core.errors import CorrectableError
from byteloom.core.storage.files import atomic_folder

TYPO_SHARE = 0.05
"""Share of letters that a typo changes."""
PASSAGE_BYTES = 400
"""Most bytes of a passage."""
SHOTS = 4
"""Examples before each question."""
CHOICES = 4
WORD = re.compile(r"[a-z]{4,10}")
GROUP = "byteloom_bytes"


class TaskTextError(CorrectableError):
    """A text has too few passages or words for tasks."""


def write_tasks(text: str, out: Path, count: int = 100, seed: int = 0) -> list[str]:
    """Write a folder of tasks, all or nothing; return their names.

    Args:
        text: any text, mostly in Latin letters.
        out: the new folder.
        count: passages or questions of each task.
        seed: of the draws.

    Raises:
        TaskTextError: the text has fewer than 8 passages or 40 different words.
        FileExistsError: the folder exists already.
        OSError: it cannot be written.
    """
    passages, words = _passages(text), sorted(set(WORD.findall(text.lower())))
    if len(passages) < 8 or len(words) < 40:
        raise TaskTextError(
            f"the text has {len(passages)} passages and {len(words)} different words of 4 to 10 letters; "
            "tasks need 8 and 40"
        )
    draws = random.Random(seed)
    chosen = draws.sample(passages, min(count, len(passages)))
    names = []
    with atomic_folder(out) as folder:
        for name, change in CHANGES.items():
            changed = [{"text": change(passage, draws)} for passage in chosen]
            names.append(_write(folder, out, name, changed, PERPLEXITY))
        for name, ask in QUESTIONS.items():
            asked = [_with_examples(ask, words, draws) for _ in range(count)]
            names.append(_write(folder, out, name, asked, ACCURACY))
        free = [_with_examples(QUESTIONS["spell"], words, draws) for _ in range(count)]
        names.append(_write(folder, out, "spell_freely", free, EXACT_MATCH))
        group = {"group": GROUP, "task": names}
        (folder / f"{GROUP}.yaml").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")
    return names


PERPLEXITY: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
ACCURACY: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "target_delimiter": " ",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
EXACT_MATCH: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[label]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32},
    "filter_list": [{"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def _write(folder: Path, out: Path, name: str, rows: Sequence[Mapping[str, Any]], form: Mapping[str, Any]) -> str:
    """Write the data and the YAML of a task; return its name."""
    task = f"byteloom_{name}"
    lines = [json.dumps(row, ensure_ascii=True) + "\n" for row in rows]
    (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    head = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(out.absolute() / f"{task}.jsonl")}},
        "test_split": "test",
    }
    content = yaml.safe_dump({**head, **form, "metadata": {"version": 1.0}}, sort_keys=False)
    (folder / f"{task}.yaml").write_text(content, encoding="utf-8")
    return task


def _passages(text: str) -> list[str]:
    """Return the paragraphs of a text that have at least four words, cut to PASSAGE_BYTES."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    cut = (paragraph.encode()[:PASSAGE_BYTES].decode("utf-8", "ignore") for paragraph in paragraphs)
    return [passage for passage in dict.fromkeys(cut) if passage.count(" ") >= 3]


def with_typos(text: str, draws: random.Random) -> str:
    """Return a text in which about TYPO_SHARE of the letters are changed: left out, doubled, replaced or swapped."""
    changed, letters = [], iter(range(len(text)))
    for place in letters:
        letter = text[place]
        if not letter.isalpha() or draws.random() >= TYPO_SHARE:
            changed.append(letter)
            continue
        after = text[place + 1] if place + 1 < len(text) else ""
        kind = draws.choice(["omit", "double", "replace", "swap"])
        if kind == "swap" and after:
            changed.append(after + letter)
            next(letters)
        elif kind == "double":
            changed.append(letter * 2)
        elif kind == "replace":
            changed.append(draws.choice(string.ascii_lowercase))
    return "".join(changed)


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "clean": lambda text, draws: text,
    "lower": lambda text, draws: text.lower(),
    "upper": lambda text, draws: text.upper(),
    "typos": with_typos,
}
"""Changes of passages by the names of their tasks."""

Question = tuple[str, str, list[str]]
"""A question, its answer, and wrong answers."""


def _with_examples(
    ask: Callable[[str, Sequence[str], random.Random], Question], words: Sequence[str], draws: random.Random
) -> dict[str, Any]:
    """Return a question after SHOTS answered ones, with its choices and the number of the right one."""
    *shots, asked = draws.sample(words, SHOTS + 1)
    lines = [f"{question} {answer}" for question, answer, _ in (ask(word, words, draws) for word in shots)]
    question, answer, wrong = ask(asked, words, draws)
    others = sorted({choice for choice in wrong if choice != answer})
    choices = [answer, *draws.sample(others, min(CHOICES - 1, len(others)))]
    draws.shuffle(choices)
    return {"question": "\n".join([*lines, question]), "choices": choices, "label": choices.index(answer)}


def _spell(word: str, words: Sequence[str], draws: random.Random) -> Question:
    return f'Spell the word "{word}":', " ".join(word), [" ".join(each) for each in _near(word, draws)]


def _unspell(word: str, words: Sequence[str], draws: random.Random) -> Question:
    return f'Join the letters "{" ".join(word)}":', word, list(_near(word, draws))


def _contains(word: str, words: Sequence[str], draws: random.Random) -> Question:
    is_in = draws.random() < 0.5
    letters = [each for each in string.ascii_lowercase if (each in word) == is_in]
    answer, other = ("yes", "no") if is_in else ("no", "yes")
    return f'Is there a "{draws.choice(letters)}" in "{word}"?', answer, [other]


def _delete(word: str, words: Sequence[str], draws: random.Random) -> Question:
    letter = draws.choice(word)
    right = word.replace(letter, "")
    return f'Delete every "{letter}" in "{word}":', right, [word, *_near(right, draws)]


def _insert(word: str, words: Sequence[str], draws: random.Random) -> Question:
    letter, added = draws.choice(word), draws.choice(string.ascii_lowercase)
    right = word.replace(letter, letter + added)
    wrong = [word, word.replace(letter, added + letter), word.replace(letter, added), *_near(right, draws)]
    return f'Add "{added}" after every "{letter}" in "{word}":', right, wrong


def _substitute(word: str, words: Sequence[str], draws: random.Random) -> Question:
    letter = draws.choice(word)
    new = draws.choice([each for each in string.ascii_lowercase if each not in word])
    right = word.replace(letter, new)
    return f'Replace every "{letter}" by "{new}" in "{word}":', right, [word, *_near(right, draws)]


def _swap(word: str, words: Sequence[str], draws: random.Random) -> Question:
    first, second = draws.sample(sorted(set(word)), 2) if len(set(word)) > 1 else (word[0], word[0])
    right = word.translate(str.maketrans(first + second, second + first))
    return f'Swap "{first}" and "{second}" in "{word}":', right, [word, *_near(right, draws)]


def _near(word: str, draws: random.Random) -> Iterator[str]:
    """Yield words that differ from a word: a letter less, more or other, and two letters swapped."""
    for _ in range(4):
        place = draws.randrange(max(1, len(word)))
        other = draws.choice(string.ascii_lowercase)
        yield word[:place] + word[place + 1 :]
        yield word[:place] + other + word[place:]
        yield word[:place] + other + word[place + 1 :]
        yield word[:place] + word[place : place + 2][::-1] + word[place + 2 :]


QUESTIONS: dict[str, Callable[[str, Sequence[str], random.Random], Question]] = {
    "spell": _spell,
    "unspell": _unspell,
    "contains": _contains,
    "delete": _delete,
    "insert": _insert,
    "substitute": _substitute,
    "swap": _swap,
}
"""Questions about a word by the names of their tasks."""
