"""Regenerating a model card keeps people's edits and updates the generated parts."""

import pytest
import yaml

from pipelines.card_edits import keep_edits

SECTIONS = ("Use", "Results", "Licence")


def generated(step: int = 1, name: str = "faces", **metadata: str) -> str:
    """A small card as rendered by a template, without the record of checksums."""
    front = yaml.safe_dump({"library_name": "diffusers", "tags": ["diffusers", "unet"]} | metadata, sort_keys=False)
    code = f'```python\n\nload("{name}")\n\n\n# done\n```'
    text = {"Use": code, "Results": f"Step {step}.", "Licence": "No licence is claimed."}
    return f"---\n{front}---\n\n# {name}\n\n" + "\n\n".join(f"## {key}\n\n{text[key]}" for key in SECTIONS) + "\n"


def parts(card: str) -> tuple[dict, str]:
    """The metadata and the text of a card, without the record of checksums."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text.split("<!-- Checksums")[0].strip()


def test_unedited_card_is_replaced_by_the_new_one():
    first, second = keep_edits(generated(1), ""), keep_edits(generated(2, license="mit"), "")
    assert parts(first) == parts(generated(1))
    assert keep_edits(generated(1), first) == first
    assert keep_edits(generated(2, license="mit"), first) == second
    assert keep_edits(generated(1), second) == first, "what was generated before does not stay"
    assert keep_edits(generated(1), first.replace("\n", "\r\n")) == first


EDITS = {
    "a section at the end": ("<!-- Checksums", "## Thanks\n\nTo those who posed.\n\n<!-- Checksums", "who posed"),
    "a paragraph between sections": ("## Results", "A word before.\n\n## Results", "A word before.\n\n## Results"),
    "a paragraph above the title": ("# faces", "![logo](logo.png)\n\n# faces", "![logo](logo.png)\n\n# faces"),
    "another top-level heading": ("<!-- Checksums", "# Appendix\n\n<!-- Checksums", "# Appendix"),
    "a title": ("# faces", "# Faces of summer", "# Faces of summer\n\n## Use"),
    "replaced text": ("No licence is claimed.", "MIT.", "## Licence\n\nMIT."),
    "code": ("# done", "# done\n\nshow()", "# done\n\nshow()\n```"),
    "non-ASCII letters": ("## Results", "Schöne Gesichter.\n\n## Results", "Schöne Gesichter."),
    "an unclosed fence": ("No licence is claimed.", "```\nMIT\n\nnot closed", "```\nMIT\n\nnot closed"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edit_survives_repeated_regeneration(edit):
    before, after, expected = EDITS[edit]
    card = keep_edits(generated(1), "").replace(before, after)
    for step in (1, 2, 3):
        card = keep_edits(generated(step), card)
        assert parts(card)[1].count(expected) == 1
        assert f"Step {step}." in card
        assert card.count("Step ") == 1
        assert card.count("<!-- Checksums") == 1
        assert ("# faces" in card) == (edit != "a title")
        assert "No licence is claimed." in card or after.startswith(("MIT", "```")), "only what was replaced goes"


def test_edit_of_a_changing_paragraph_is_kept_once_below_it():
    card = keep_edits(generated(1), "").replace("Step 1.", "Step 1, at last.")
    assert "Step 1.\n" not in keep_edits(generated(1), card)
    for step in (2, 3):
        card = keep_edits(generated(step), card)
        assert f"## Results\n\nStep {step}.\n\nStep 1, at last.\n\n## Licence" in card


def test_deleted_parts_stay_deleted_until_they_change():
    card = keep_edits(generated(1), "").replace("Step 1.\n\n", "").replace("library_name: diffusers\n", "")
    for _ in range(2):
        card = keep_edits(generated(1), card)
        assert "Step" not in card
        assert "library_name" not in card
    assert "Step 2." in keep_edits(generated(2), card)


@pytest.mark.parametrize(
    "previous", ["---\nlicense: mit\n# a note\n---\n", "---\nlicense: mit\n---\n\n# Mine\n\nA text.\n"]
)
def test_card_started_by_hand_is_kept(previous):
    metadata, text = parts(keep_edits(generated(license="other"), previous))
    assert metadata == {"library_name": "diffusers", "tags": ["diffusers", "unet"], "license": "mit"}
    assert ("A text." in text) == ("A text." in previous)
    assert text.count("\n# ") + text.startswith("# ") == 1 + text.count("\n# done")
    assert "Step 1." in text


def test_metadata_edits_override_generated_values():
    """An edited value wins, an added entry stays, and a comment does not duplicate a key."""
    card = keep_edits(generated(license="other"), "")
    card = card.replace("license: other", "# ours\nlicense: cc-by-4.0\nlanguage: en").replace(
        "- unet", "- unet\n- 32x32"
    )
    metadata, _ = parts(keep_edits(generated(2, license="apache-2.0", datasets="faces"), card))
    assert metadata["tags"] == ["diffusers", "unet", "32x32"]
    assert metadata | {"tags": []} == {
        "library_name": "diffusers",
        "tags": [],
        "license": "cc-by-4.0",
        "datasets": "faces",
        "language": "en",
    }


def test_comment_on_top_of_the_metadata_keeps_no_generated_entry_alive():
    card = keep_edits(generated(1, datasets="old"), "").replace("---\n", "---\n# ours\nlanguage: en\n", 1)
    for _ in range(3):
        card = keep_edits(generated(2, datasets="new"), card)
        metadata, _ = parts(card)
        assert (metadata["datasets"], metadata["language"], card.count("# ours")) == ("new", "en", 1)


def test_local_and_hub_edits_are_merged():
    """The local card is pushed repeatedly and edited both locally and on the Hub in between."""
    local, hub = keep_edits(generated(1), ""), ""

    def push(step: int) -> str:
        return keep_edits(keep_edits(generated(step, "me/faces"), local), hub, is_on_hub=True)

    local = local.replace("## Results", "Written here.\n\n## Results")
    hub = push(1)
    assert "Written here.\n\n## Results" in hub
    hub = hub.replace("## Licence", "Written there.\n\n## Licence").replace("# me/faces", "# Title there")
    for step in (2, 3):
        hub = push(step)
        assert f"Written here.\n\n## Results\n\nStep {step}.\n\nWritten there.\n\n## Licence" in hub
        assert "me/faces" not in hub.replace('load("me/faces")', "")
    downloaded = keep_edits(generated(4, "copy"), hub)
    assert "Written here.\n\n## Results\n\nStep 4.\n\nWritten there." in downloaded
    local = local.replace("Written here.", "Written here, again.")
    hub = push(4)
    assert "Written here, again.\n\n## Results\n\nStep 4.\n\nWritten there." in hub
    assert "Written here." not in hub
    local = local.replace("Written here, again.\n\n", "")
    hub = push(5)
    assert "Written here" not in hub
    assert "Written there." in hub
