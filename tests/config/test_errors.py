"""The catalogue of configuration errors, C1 to C10 (C8: test_diff.py): each message has file:line, key, expectation, remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import job_queries
from pipeline.config.check import check
from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from pipeline.layout import RunDir
from tests.config.jobs import JOB, changed, complaint, load_and_check, write


def test_the_small_job_itself_is_fine(tmp_path: Path) -> None:
    loaded = load_and_check(write(tmp_path, JOB))
    assert job_queries.stage_names(loaded.job) == [
        "prepare",
        "pretrain",
        "finetune",
        "evaluate",
        "export",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("name: small", "naem: small\nname: small"),
            "job.yaml:1: unknown key 'naem'\n  -> did you mean 'name'?",
        ),
        (
            ("epochs: 3", "epoch: 3"),
            "job.yaml:10: unknown key 'epoch' in stages.pretrain\n  -> did you mean 'epochs'?",
        ),
        (
            ("{from: finetune}\n  export", "{frm: finetune}\n  export"),
            "job.yaml:12: unknown key 'frm' in stages.evaluate\n  -> did you mean 'from'?",
        ),
        (
            ("epochs: 3", "augment: {mixpu: 0}"),
            "job.yaml:10: unknown key 'mixpu' in stages.pretrain.augment\n  -> did you mean 'mixup'?",
        ),
        (
            ("layout:", "layuot:"),
            "job.yaml:5: unknown key 'layuot' in data.toy\n  -> did you mean 'layout'?",
        ),
        (
            ("cluster: local", "columns: 4"),
            "job.yaml:3: unknown key 'columns'\n  -> it belongs to model.columns",
        ),
        (
            ("recipe: quickstart_pretrain", "base: quickstart_pretrain"),
            "job.yaml:9: unknown key 'base' in stages.pretrain\n  -> did you mean 'recipe'?",
        ),
        (
            ("epochs: 3", "xyzzy: 3"),
            "job.yaml:10: unknown key 'xyzzy' in stages.pretrain\n  -> keys here: augment, ",
        ),
    ],
)
def test_c1_unknown_key_with_the_nearest_one(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert message in complaint(tmp_path, changed(*change))


def test_c1_typo_in_a_dataset_without_a_name(tmp_path: Path) -> None:
    text = JOB.replace(
        '\n  toy: {root: "/images", layout: class_tars}', " {rot: /images, layuot: class_tars}"
    )
    message = complaint(tmp_path, text)
    assert "job.yaml:4: unknown key 'rot' in data.images\n  -> did you mean 'root'?" in message
    assert "job.yaml:4: unknown key 'layuot' in data.images\n  -> did you mean 'layout'?" in message


def test_c1_in_a_file_that_the_job_names(tmp_path: Path) -> None:
    write(tmp_path, "# mine\ncolums: 8\n", "configs/model/mine.yaml")
    message = complaint(tmp_path, changed("model: revcol_quickstart", "model: mine"))
    assert (
        "configs/model/mine.yaml:2: unknown key 'colums' in model\n  -> did you mean 'columns'?"
        in message
    )


@pytest.mark.parametrize("place", ["job.yaml", "configs/model/mine.yaml"])
def test_c2_duplicate_key(tmp_path: Path, place: str) -> None:
    write(tmp_path, "columns: 4\n", "configs/model/mine.yaml")
    text = changed("model: revcol_quickstart", "model: mine")
    twice = (
        changed("epochs: 3", "epochs: 3\n    epochs: 4", text=text)
        if place == "job.yaml"
        else "columns: 4\ncolumns: 5\n"
    )
    write(tmp_path, twice, place)
    message = complaint(tmp_path, twice if place == "job.yaml" else text)
    key, first, second = ("epochs", 10, 11) if place == "job.yaml" else ("columns", 1, 2)
    assert (
        message
        == f"{place}:{second}: the key '{key}' is written twice (first at {place}:{first})\n  -> keep one of them"
    )


@pytest.mark.parametrize("written", ["1e-4", "1.e-4", "1E-4", "0.0001", "100e-6"])
def test_c3_bare_exponents_are_numbers(tmp_path: Path, written: str) -> None:
    in_file = load_job(write(tmp_path, changed("epochs: 3", f"base_lr: {written}"))).job
    on_line = load_job(write(tmp_path, JOB), [f"stages.pretrain.base_lr={written}"]).job
    for job in (in_file, on_line):
        assert job.stages.pretrain is not None
        assert job.stages.pretrain.base_lr == pytest.approx(1e-4, rel=1e-12)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            'epochs: "3"',
            'stages.pretrain.epochs: expected a whole number above 0, given "3"\n  -> take the quotes away: 3',
        ),
        (
            "epochs: 3.5",
            "stages.pretrain.epochs: expected a whole number above 0, given 3.5\n  -> Passes over",
        ),
        (
            "epochs: 3.0",
            "stages.pretrain.epochs: expected a whole number above 0, given 3.0\n  -> write 3",
        ),
        ("epochs: -1", "stages.pretrain.epochs: expected a whole number above 0, given -1"),
        ("epochs:", "stages.pretrain.epochs: expected a whole number above 0, given null"),
        (
            "base_lr: fast",
            'stages.pretrain.base_lr: expected a number above 0, given "fast"\n  -> Peak learning rate',
        ),
        ("base_lr: .nan", "stages.pretrain.base_lr: expected a number above 0, given NaN"),
        (
            "precision: bf61",
            "stages.pretrain.precision: expected one of 'bf16', 'fp32', given \"bf61\"\n  -> did you mean 'bf16'?",
        ),
        (
            "zero_stage: 4",
            "stages.pretrain.zero_stage: expected a whole number from 0 to 3, given 4",
        ),
        (
            "intermediate_supervision: yes",
            'stages.pretrain.intermediate_supervision: expected true or false, given "yes"',
        ),
        (
            "betas: [0.9]",
            "stages.pretrain.betas: expected a list of 2 values, each a number from 0 to 1, given [0.9]",
        ),
        ("augment: strong", 'stages.pretrain.augment: expected a mapping, given "strong"'),
        (
            "drop_path: 1.0",
            "stages.pretrain.drop_path: expected a number, 0 or more and below 1 or null, given 1.0",
        ),
    ],
)
def test_c4_wrong_type(tmp_path: Path, written: str, message: str) -> None:
    assert f"job.yaml:10: {message}" in complaint(tmp_path, changed("epochs: 3", written))


def test_c4_text_that_looks_like_a_number(tmp_path: Path) -> None:
    message = complaint(tmp_path, changed("name: small", "name: 2024"))
    assert (
        message
        == "job.yaml:1: name: expected text of 1 to 64 characters, given 2024\n  -> put it in quotes"
    )


@pytest.mark.parametrize("name", ["a/b", "../up", ".hidden", "a\\b", '"a\\nb"', "x" * 65])
def test_names_that_are_no_folder(tmp_path: Path, name: str) -> None:
    assert "job.yaml:1: name: expected text of 1 to 64 characters" in complaint(
        tmp_path, changed("name: small", f"name: {name}")
    )


def test_names_of_datasets_are_names_of_folders(tmp_path: Path) -> None:
    message = complaint(tmp_path, changed("  toy:", '  "../toy":'))
    assert "job.yaml:5" in message
    assert "'../toy' cannot be the name of a dataset" in message


def test_missing_keys(tmp_path: Path) -> None:
    message = complaint(tmp_path, changed("    recipe: quickstart_pretrain\n", ""))
    assert message.startswith(
        "job.yaml:8: stages.pretrain.base_lr is missing: expected a number above 0\n  -> write it, or name a recipe"
    )
    message = complaint(tmp_path, "name: small\nmodel: revcol_tiny\n")
    assert message.count("is missing") == 2
    assert "data is missing" in message
    assert "stages is missing" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stages.pretrain.image_size=100"],
            "--set: stages.pretrain.image_size: 100 pixels is not a multiple of 32\n  -> take 96 or 128",
        ),
        (
            ["stages.evaluate.image_size=100"],
            "--set: stages.evaluate.image_size: 100 pixels is not a multiple of 32",
        ),
        (
            ["stages.pretrain.global_batch=63"],
            "--set: stages.pretrain.global_batch: 63 images cannot be shared evenly by 2 processes\n  -> take 62 or 64",
        ),
        (
            ["stages.pretrain.micro_batch=5"],
            "--set: stages.pretrain.micro_batch: a process's share of 32 images (global_batch 64 / 2) is not a multiple of "
            "micro_batch 5"
            "\n  -> take one of 1, 2, 4, 8",
        ),
        (
            ["stages.pretrain.micro_batch=1"],
            "--set: stages.pretrain.micro_batch: mixup and cutmix pair the images of a micro batch, and 1 is odd",
        ),
        (
            ["model.columns=3"],
            "supervision: intermediate supervision needs 4 columns, the model has 3"
            "\n  -> intermediate_supervision: false, or a model of more columns",
        ),
        (
            ["stages.pretrain.zero_stage=3", "model.compile=true"],
            "--set: model.compile: levels whose parameters ZeRO-3 gathers cannot be compiled"
            "\n  -> stages.pretrain.zero_stage: 2, or compile: false",
        ),
        (
            ["stages.pretrain.zero_stage=0", "stages.pretrain.precision=bf16"],
            "--set: stages.pretrain.zero_stage: ZeRO stage 0 with bf16",
        ),
        (
            ["stages.pretrain.warmup_epochs=4"],
            "--set: stages.pretrain.warmup_epochs: 4 epochs of warm-up in a stage of 3\n  -> take at most 3",
        ),
        (
            ["stages.pretrain.min_lr=1"],
            "--set: stages.pretrain.min_lr: 1 is above the peak learning rate 0.002",
        ),
        (
            ["stages.pretrain.eval_resize=0.9"],
            "--set: stages.pretrain.eval_resize: 0.9 makes images smaller than the crop",
        ),
        (
            ["stages.pretrain.augment.crop_scale=[0.9, 0.1]"],
            "--set: stages.pretrain.augment.crop_scale: [0.9, 0.1] is no range",
        ),
        (
            ["stages.pretrain.augment.crop_ratio=[2, 1]"],
            "--set: stages.pretrain.augment.crop_ratio: [2, 1] is no range",
        ),
        (
            ["stages.pretrain.augment.randaugment=11"],
            "--set: stages.pretrain.augment.randaugment: magnitude 11 is above 10",
        ),
        (["data.toy.root="], "--set: data.toy.root: no source is given"),
        (
            ["data.toy.synthetic={min_size: 90, max_size: 80}"],
            "data.toy.synthetic.min_size: 90 is above max_size 80",
        ),
        (
            ["data.toy.synthetic={min_size: 20}"],
            "data.toy.synthetic.min_size: images of 20 pixels would all be quarantined (min_side 32)",
        ),
        (
            ["data.toy.synthetic={}", "data.toy.layout=huggingface"],
            "--set: data.toy.layout: images cannot be generated in the layout 'huggingface'",
        ),
        (
            ["data.toy.synthetic={classes: 2000}", "data.toy.classes=imagenet1k"],
            "--set: data.toy.synthetic.classes: 2000 classes wanted, the list imagenet1k has 1000",
        ),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, list) else "",
)
def test_c5_combinations_that_cannot_work(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in complaint(tmp_path, JOB, *overrides)


def test_c5_evaluation_on_classes_that_the_head_does_not_have(tmp_path: Path) -> None:
    text = changed(
        *("data:\n", "data:\n  other: {root: /other, classes: imagenet1k}\n"),
        *("pretrain:\n", "pretrain:\n    data: toy\n"),
        *("{recipe: quickstart_f", "{data: toy, recipe: quickstart_f"),
        *("evaluate: {", "evaluate: {data: other, "),
    )
    message = complaint(tmp_path, text)
    expected = "stages.evaluate.data: the head of 'finetune' has the classes of toy (auto), not those of other (imagenet1k)"
    "\n  -> data: toy"
    assert f"job.yaml:14: {expected}" in message


def test_c6_missing_files(tmp_path: Path) -> None:
    message = complaint(tmp_path, changed("model: revcol_quickstart", "model: revcol_quikstart"))
    assert (
        message
        == "job.yaml:2: model: there is no file configs/model/revcol_quikstart.yaml\n  -> did you mean 'revcol_quickstart'?"
    )
    message = complaint(tmp_path, changed("recipe: quickstart_pretrain", "recipe: nothing_like_it"))
    assert message.startswith(
        "job.yaml:9: stages.pretrain.recipe: there is no file configs/recipe/nothing_like_it.yaml\n  -> "
    )
    message = complaint(tmp_path, changed("layout: class_tars", "classes: imagenet1"))
    assert (
        message
        == "job.yaml:5: data.toy.classes: no class list 'imagenet1'\n  -> did you mean 'imagenet1k'?"
    )
    message = complaint(
        tmp_path,
        changed(
            "recipe: quickstart_pretrain", "recipe: quickstart_pretrain\n    from: gone.safetensors"
        ),
    )
    assert "job.yaml:10: stages.pretrain.from: there is no file" in message
    write(tmp_path, JOB, "mine.yaml")
    with pytest.raises(
        ConfigError,
        match=r"mien\.yaml: cannot be read: No such file or directory\n  -> did you mean 'mine\.yaml'\?",
    ):
        load_job(tmp_path / "mien.yaml")


def test_c6_files_that_include_each_other(tmp_path: Path) -> None:
    write(tmp_path, "base: b\n", "configs/model/a.yaml")
    write(tmp_path, "columns: 4\nbase: a\n", "configs/model/b.yaml")
    message = complaint(tmp_path, changed("model: revcol_quickstart", "model: a"))
    loop = "configs/model/a.yaml -> configs/model/b.yaml -> configs/model/a.yaml"
    assert (
        message
        == f"configs/model/b.yaml:2: model: the files include each other: {loop}\n  -> take one `base` away"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("from: pretrain", "from: evaluate"),
            "job.yaml:11: stages.finetune.from: 'evaluate' makes no weights before finetune\n  -> from: pretrain",
        ),
        (
            ("from: pretrain", "from: pretrian"),
            "job.yaml:11: stages.finetune.from: 'pretrian' is neither a training stage nor a .safetensors file"
            "\n  -> did you mean 'pretrain'?",
        ),
        (
            ("  finetune: {recipe: quickstart_finetune, from: pretrain}\n", ""),
            "job.yaml:11: stages.evaluate.from: needs the weights of 'finetune', which the job does not have"
            "\n  -> from: pretrain",
        ),
        (
            ("  prepare: {}\n", ""),
            "job.yaml:7: stages.pretrain.data: no stage prepares the dataset 'toy'\n  -> add `prepare: {}` to the stages",
        ),
        (
            ("epochs: 3", "data: tyo"),
            "job.yaml:10: stages.pretrain.data: the job has no dataset 'tyo'\n  -> did you mean 'toy'?",
        ),
        (
            ("prepare: {}", "prepare: {data: [tyo]}"),
            "job.yaml:7: stages.prepare.data: the job has no dataset 'tyo'\n  -> did you mean 'toy'?",
        ),
    ],
)
def test_c7_a_stage_needs_what_no_stage_makes(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    assert message in complaint(tmp_path, changed(*change))


def test_c7_what_an_earlier_run_left_there_will_do(tmp_path: Path) -> None:
    text = changed(
        "  prepare: {}\n", "", "  pretrain:\n    recipe: quickstart_pretrain\n    epochs: 3\n", ""
    )
    loaded = load_job(write(tmp_path, text))
    with pytest.raises(ConfigError, match="needs the weights of 'pretrain'"):
        check(loaded.job, 2, loaded.origins, RunDir(tmp_path / "run"))
    write(tmp_path, "", "run/stages/pretrain/weights.safetensors")
    write(tmp_path, "", "run/stages/prepare/toy/dataset.json")
    check(loaded.job, 2, loaded.origins, RunDir(tmp_path / "run"))


def test_c9_unset_variables_are_told_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.delenv("NOR_THIS", raising=False)
    text = changed(
        'root: "/images"', 'root: "${NOT_SET}/images"', "epochs: 3", "epochs: ${NOR_THIS}"
    )
    message = complaint(tmp_path, text)
    assert message.startswith("2 problems:\n")
    assert (
        "job.yaml:5: data.toy.root: the environment variable NOT_SET is not set"
        "\n  -> export NOT_SET=..., or add --set data.toy.root=VALUE" in message
    )
    assert (
        "job.yaml:10: stages.pretrain.epochs: the environment variable NOR_THIS is not set"
        in message
    )
    monkeypatch.setenv("NOT_SET", "/somewhere")
    monkeypatch.setenv("NOR_THIS", "5")
    job = load_job(write(tmp_path, text)).job
    assert job.data["toy"].root == "/somewhere/images"
    assert job.stages.pretrain is not None
    assert job.stages.pretrain.epochs == 5


@pytest.mark.parametrize("written", ["${}", "${A B}", "${A:-${B}}", "${A", "${1}"])
def test_c9_what_is_no_substitution(tmp_path: Path, written: str) -> None:
    message = complaint(tmp_path, changed('root: "/images"', f'root: "{written}"'))
    assert "job.yaml:5: data.toy.root: '${" in message
    assert "is not a substitution\n  -> write ${NAME} or ${NAME:-default}" in message


def test_c9_unquoted_in_braces(tmp_path: Path) -> None:
    message = complaint(tmp_path, changed('root: "/images"', "root: ${HOME}"))
    assert message.startswith("job.yaml:5: not readable as YAML")
    assert message.endswith('-> put the value in quotes ("${NAME}"), or on a line of its own')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "job.yaml: is empty\n  -> a job names its model, data and stages: see jobs/quickstart.yaml",
        ),
        (b"# nothing but this\n", "job.yaml: is empty"),
        (
            b"- name\n- model\n",
            "job.yaml:1: holds a list, not a mapping\n  -> write `key: value` lines",
        ),
        (b"\nname\n", "job.yaml:2: holds a single value, not a mapping"),
        (
            b"name: x\nmodel: caf\xe9\n",
            "job.yaml:2: byte 0xe9 is not UTF-8 text\n  -> save the file as UTF-8",
        ),
        ("name: x\n".encode("utf-16"), "job.yaml:1: byte 0xff is not UTF-8 text"),
        (
            b"name: x\nmodel:\n\tcolumns: 4\n",
            "job.yaml:3: indented with a tab\n  -> YAML is indented with spaces only",
        ),
        (b"name: x\n  \tmodel: y\n", "job.yaml:2: indented with a tab"),
        (b"name: x\n\t# a remark\nmodel: y\n", "job.yaml:2: indented with a tab"),
        (b"name: x: y\n", "job.yaml:1: not readable as YAML"),
        (b"name: x\nmodel: y\0\n", "job.yaml:2: not readable as YAML"),
        (b'name: "a\\0b"\n', "job.yaml:1: a NUL character in a value"),
        (b"name: x\n---\nname: y\n", "job.yaml:2: not readable as YAML"),
        (b"? [a, b]\n: 1\n", "job.yaml:1: a key must be a single word"),
    ],
)
def test_c10_files_that_are_no_job(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in complaint(tmp_path, content)


def test_c10_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_job(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    load_and_check(write(tmp_path, b"\xef\xbb\xbf" + JOB.replace("\n", "\r\n").encode()))


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    text = changed(
        "name: small",
        "nmae: small",
        "epochs: 3",
        "epochs: many\n    base_lr: 0",
        "layout: class_tars",
        "min_side: 1.5",
    )
    message = complaint(tmp_path, text)
    assert message.startswith("5 problems:\njob.yaml:1: unknown key 'nmae'")
    for part in (
        "name is missing",
        "job.yaml:10: stages.pretrain.epochs",
        "job.yaml:11: stages.pretrain.base_lr",
        "job.yaml:5: data.toy.min_side",
    ):
        assert part in message
    message = complaint(
        tmp_path,
        JOB,
        "stages.pretrain.image_size=100",
        "stages.finetune.global_batch=31",
        "stages.evaluate.from=pretrian",
    )
    assert message.startswith("3 problems:\n")
