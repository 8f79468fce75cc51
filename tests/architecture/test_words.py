"""One vocabulary and plain English, as far as a search can tell."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.architecture.source_tree import ROOT, python_files, shown, text_of, tracked, tree_of

PLACES = ("pipeline", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "jobs", "configs")
PROSE = [
    path
    for path in tracked(*PLACES, "tests", "docker", "launch.sh", ".ci")
    if path.suffix in (".py", ".md", ".yaml", ".yml", ".sh", ".txt", ".toml", "")
]
# Split by "|" here, so that this file does not contain the words itself.
HARD_TO_READ = [
    "an|ew",
    "goes| on",
    "go| on",
    "is| told",
    "are| told",
    "made| up",
    "makes| .* up",
    "patient|ly",
    "is| said",
    "are| said",
]
COUNTED = (
    "images|samples|steps|bytes|seconds|columns|layers|rows|files|shards|blocks|batches|elements|"
    "bits|numbers|values|lines|entries|tokens|channels|pixels|threads|processes|views|draws|"
    "parameters|records|requests|tars|folders|workers|factor|one|two|three|four"
)
UNITS = (
    "second|step|process|rank|column|class|shard|image|file|epoch|row|machine|layer|level|GPU|core|"
    "batch|node|unit|line|request|channel|worker|thread|host|sample|group|stage|device"
)
PER = re.compile(rf"\b({COUNTED}) an? ({UNITS})\b")
# Names that the vocabulary replaced; a name counts by its parts: SpillPlan -> spill, plan.
REPLACED = {
    "masters",
    "integrity",
    "withhold",
    "poison",
    "curable",
    "redo",
    "agreement",
    "wish",
    "health",
    "fixedpoint",
    "fates",
    "fate",
    "spill",
    "spills",
    "spilled",
    "dirt",
    "ledger",
    "figures",
    "say",
    "told",
    "tick",
    "randomness",
    "subject",
}
# Names that say nothing: a noun of the domain stands there instead.
EMPTY_NAMES = {"one", "found", "what", "told", "more", "how", "them"}
REPLACED_CLASSES = {"World", "Place", "Piece", "StandIns", "Ring", "Clock", "Stepper", "Passes"}
REPLACED_KEYS = {
    "lr",
    "lr_batch",
    "ema",
    "supervision",
    "repeats",
    "erasing",
    "cutmix_share",
    "log_steps",
    "checkpoint_steps",
    "eval_epochs",
    "generate",
    "dirt",
}


def _hits(search: re.Pattern[str]) -> list[str]:
    """Every line of the prose that matches, with its file."""
    return [
        f"{shown(path)}:{number}: {line.strip()}"
        for path in PROSE
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if search.search(line)
    ]


def test_no_wording_needs_a_second_reading() -> None:
    pattern = "|".join(words.replace("|", "") for words in HARD_TO_READ)
    assert not _hits(re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE))


def test_rates_are_written_with_per() -> None:
    assert not _hits(PER)


def _names(tree: ast.AST) -> Iterator[str]:
    """Every name that a file defines or binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _parts(name: str) -> set[str]:
    """The words of a name: ``spill_unit`` and ``SpillUnit`` -> spill, unit."""
    return set(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower().split("_"))


def test_names_are_those_of_the_vocabulary() -> None:
    replaced: dict[str, set[str]] = {}
    for path in python_files("pipeline", "tests"):
        names = set(_names(tree_of(path)))
        hits = {name for name in names if _parts(name) & REPLACED}
        hits |= names & (REPLACED_CLASSES | EMPTY_NAMES)
        if hits:
            replaced[shown(path)] = hits
    assert not replaced


def test_modules_have_the_names_of_the_vocabulary() -> None:
    stems = {path.stem for path in python_files("pipeline")}
    assert not {stem for stem in stems if _parts(stem) & REPLACED}


def test_shipped_jobs_use_the_keys_of_the_schema() -> None:
    for path in tracked("jobs", "configs"):
        if path.suffix == ".yaml":
            keys = set(re.findall(r"([A-Za-z_]+):", text_of(path)))
            assert not keys & REPLACED_KEYS, shown(path)


def test_two_classes_of_the_same_name_do_not_exist() -> None:
    places: dict[str, list[str]] = {}
    for path in python_files("pipeline"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(shown(path))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_the_searched_places_exist() -> None:
    assert all((ROOT / place).exists() for place in PLACES)
