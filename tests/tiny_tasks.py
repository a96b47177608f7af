"""Tasks of lm-eval that a test writes itself: a few questions on animals, which need no network."""

from __future__ import annotations

import json
from pathlib import Path

ANIMALS = ("fox", "heron", "newt", "badger", "wren", "mole", "toad")
PLACES = ("wood", "old mill", "reeds", "den by the long wall", "sea", "cold river", "barn")
QUESTIONS = [
    {
        "question": f"One day a {animal} went to the",
        "choices": [PLACES[(number + step) % 7] for step in (0, 1, 3)],
        "answer": number * number % 3,
    }
    for number, animal in enumerate([*ANIMALS, *(f"grey {animal}" for animal in ANIMALS)])
]  # fmt: skip
EXAMPLE = {"question": "A goose stood on the", "choices": ["ice", "pier"], "answer": 1}
DATA = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/questions.jsonl, train: {folder}/example.jsonl}}
  cache_dir: {folder}/cache
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TASKS = {
    "animals": DATA + CHOICE,
    "more_animals": DATA + CHOICE,
    "endings": DATA + """output_type: loglikelihood
doc_to_target: " {{{{choices[answer]}}}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "fetched": """
dataset_path: nobody/nothing-of-this-name
test_split: test
output_type: loglikelihood
doc_to_text: a
doc_to_target: b
""",
    "broken": DATA.replace("question}}}}", "question") + CHOICE,
}  # fmt: skip
GROUP = """group: zoo
task: [animals, more_animals]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


def write_tasks(folder: Path) -> Path:
    """Write the tasks, and the group zoo of the first two, to `folder`; returns it."""
    for name, rows in (("questions", QUESTIONS), ("example", [EXAMPLE])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, text in TASKS.items():
        written = f"task: {name}{text.format(folder=folder.as_posix())}"
        (folder / f"{name}.yaml").write_text(written, encoding="utf-8")
    (folder / "zoo.yaml").write_text(GROUP, encoding="utf-8")
    return folder
