"""Files damaged at random, of all formats: none ends a preparation, none is kept undecodable."""

from __future__ import annotations

import random
from pathlib import Path

from tests.prepare.damaged_files import damaged, fuzz, judge, sound_files
from tests.prepare.results import description, quarantine_list
from tests.prepare.source_folders import images, prepare

COUNT = 500


def test_sound_files_of_all_formats_are_kept() -> None:
    assert {form: judge(data) for form, data in sound_files().items()} == dict.fromkeys(
        sound_files(), ""
    )


def test_no_damage_escapes() -> None:
    verdicts = fuzz(seed=0, count=COUNT)
    assert verdicts.total() == COUNT
    forms = {form for form, reason in verdicts if reason}
    assert forms == set(sound_files()), "every format has rejected files"


def test_every_rejected_file_is_listed_with_its_reason(tmp_path: Path) -> None:
    for label in range(2):
        folder = tmp_path / "in" / f"c{label}"
        folder.mkdir(parents=True)
        for name, data in images(label, 8).items():
            (folder / name).write_bytes(data)
    choices = random.Random(3)
    files = {}
    for number in range(4):
        for form, data in sound_files().items():
            files[f"{number}_{form}.jpg"] = damaged(data, choices)
    for name, data in files.items():
        (tmp_path / "in" / "c0" / name).write_bytes(data)
    prepare(tmp_path / "in", tmp_path / "out")
    wanted = {f"c0/{name}" for name, data in files.items() if judge(data)}
    values = description(tmp_path / "out")
    rejected = sum(values["rejected"].values())
    entries = quarantine_list(tmp_path / "out")[:rejected]
    # Other limits than those of ``judge`` reject some more for their size.
    assert {entry["key"] for entry in entries} >= wanted
    assert all(entry["reason"] and entry["detail"] for entry in entries)
