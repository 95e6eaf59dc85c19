"""Keeps manual edits of a model card when the card is regenerated.

A card is a list of blocks: the entries of its metadata, and its paragraphs, tables and code blocks. A comment on its
last line has a checksum of each generated block; every other block was written by a person and stays where it is. A
generated block that a person replaced or deleted returns only when the model changes it, and then appears above the
person's version. In a card without checksums, everything counts as written by a person.
"""

import hashlib
import re
from collections import defaultdict
from difflib import SequenceMatcher

# Comments at the end of a card: checksums of its blocks, with a plus for pushed edits; files that were pushed
BLOCKS = "<!-- Checksums of what pipelines.export wrote; it keeps everything else: {} -->"
FILES = "<!-- Files that pipelines.export pushed; its next push deletes those that it lacks: {} -->"


def keep_edits(card: str, previous: str, is_on_hub: bool = False) -> str:
    """The new card with the manual edits of the card that it replaces.

    Args:
        card: the new card as generated, or as returned by this function for another copy.
        previous: the card to replace; empty if there is none.
        is_on_hub: whether `previous` is on the Hub. Edits that an earlier push copied there from the local card are
            then replaced by the current ones of the local card; otherwise they are kept like all other edits.
    """
    metadata, body = _split(card)
    checksums = [_checksum(block) for block in (*metadata.values(), *body)]
    generated = recorded(BLOCKS, card) or checksums
    record = generated + [f"+{checksum}" for checksum in checksums if checksum not in generated]
    if previous:
        old_metadata, old_body = _split(previous)
        base = recorded(BLOCKS, previous) or []
        base = [checksum.lstrip("+") for checksum in base if is_on_hub or checksum[0] != "+"]
        kept = {key: entry for key, entry in old_metadata.items() if _checksum(entry) not in base}
        still = {key: entry for key, entry in metadata.items() if key in old_metadata or _checksum(entry) not in base}
        metadata, body = still | kept, _merge(base, old_body, body)
    front = "\n".join(["---", *metadata.values(), "---"])
    return "\n\n".join([front, *body, BLOCKS.format(" ".join(record))]) + "\n"


def _split(card: str) -> tuple[dict[str, str], list[str]]:
    """The entries of the metadata by key, and the blocks of the text."""
    card = re.sub(f"{_pattern(BLOCKS)}|{_pattern(FILES)}", "", card.replace("\r\n", "\n"))
    match = re.match(r"---\n(.*?\n)?---\n", card, re.DOTALL)
    entries = re.split(r"\n(?=[^\s-])", (match[1] or "").strip("\n")) if match else []
    metadata = {entry if entry[0] == "#" else entry.partition(":")[0]: entry for entry in entries if entry}
    blocks, in_code = [""], False
    for line in card[match.end() if match else 0 :].splitlines():
        if line.strip() or in_code:
            blocks[-1] += f"{line}\n"
        elif blocks[-1]:
            blocks.append("")
        in_code ^= line.startswith("```")
    return metadata, [block.rstrip("\n") for block in blocks if block]


def _checksum(block: str) -> str:
    return hashlib.sha256(" ".join(block.split()).encode(errors="surrogateescape")).hexdigest()[:8]


def recorded(comment: str, card: str) -> list[str] | None:
    """The items listed in the BLOCKS or FILES comment of a card; None if the card has no such comment."""
    match = re.search(_pattern(comment), card)
    return match and match[1].split()


def _pattern(comment: str) -> str:
    return re.escape(comment).replace(re.escape("{}"), "([^>]*)")


def _merge(base: list[str], old: list[str], new: list[str]) -> list[str]:
    """The new blocks with the changes that people made to the old ones: a three-way merge of blocks.

    Args:
        base: checksums of the old blocks as generated.
    """
    old_checksums, new_checksums = [_checksum(block) for block in old], [_checksum(block) for block in new]
    removed, inserted = set(), defaultdict(list)  # by position in `base`
    for tag, start, end, old_start, old_end in _opcodes(base, old_checksums):
        if tag != "equal":
            removed |= {i for i in range(start, end) if base[i] not in old_checksums}
            inserted[end] += [b for b in old[old_start:old_end] if _checksum(b) not in (*base, *new_checksums)]
    merged = []
    for tag, start, end, new_start, new_end in _opcodes(base, new_checksums):
        if tag == "insert":
            merged += inserted.pop(start, [])
        for i in range(max(end - start, new_end - new_start)):
            merged += inserted.pop(start + i, []) if start + i < end else []
            if new_start + i < new_end and not (tag == "equal" and start + i in removed):
                merged.append(new[new_start + i])
    merged += inserted.pop(len(base), [])
    titles = [block for block in old if block.startswith("# ")]
    if titles and not any(_checksum(title) in (*base, *new_checksums) for title in titles):
        # keep a person's title; a pushed card's generated title differs from the local one, as if the model changed it
        merged = [block for block in merged if not block.startswith("# ") or block in titles]
    return merged


def _opcodes(before: list[str], after: list[str]) -> list[tuple]:
    return SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
