"""The README keeps its promises: links lead somewhere, and its head is a valid Space card."""

import re
from pathlib import Path

from huggingface_hub import metadata_load

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


def test_relative_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?://|#)([^)]+)\)", README.read_text(encoding="utf-8"))
    assert "assets/pictures/page.png" in targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_head_is_a_space_card():
    card = metadata_load(README)
    assert card["sdk"] == "gradio"
    assert (ROOT / card["app_file"]).is_file()
    assert card["python_version"] == "3.12"  # a string: 3.1 and 3.10 would be one number
    assert len(card["short_description"]) <= 60
    assert {card["colorFrom"], card["colorTo"]} <= COLOURS


def test_ci_finds_both_commands():
    text = README.read_text(encoding="utf-8")
    for name, command in (("run", "python app.py"), ("test", "python -m pytest")):
        (block,) = re.findall(rf"<!-- {name} -->\n```bash\n(.+)\n```", text)
        assert command in block
