"""Every row of the table of docs/in_pytorch.md names the test that backs it."""

from __future__ import annotations

from tests.docs.markdown import ROOT


def test_every_row_of_the_table_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "in_pytorch.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        file, _, name = row.split("|")[-2].strip().partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), row
