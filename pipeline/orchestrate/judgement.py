"""Judges every stage of a call before the first one runs.

A stage that must not be restarted has to be found before an earlier stage replaces what it was
started with. Example: all stages are done, and images were added to the folder.

    prepare    would run, and write another dataset        forecast: its fingerprint
    pretrain   was trained on the present dataset          refused, so prepare does not run either
    finetune   started from the weights of pretrain        refused with it

The forecast stands for inputs that are still to be written: the fingerprint of each dataset and the
digest of each stage's weights, by the path where they will lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.checkpoint.manifest import list_checkpoints
from pipeline.config import job_queries
from pipeline.config.job_queries import TRAINING, prepared_names
from pipeline.config.resume_diff import Change, changes
from pipeline.config.schema import Job
from pipeline.config.stage_settings import settings_of
from pipeline.errors import ConfigError, DataError
from pipeline.layout import RunDir
from pipeline.orchestrate import artifacts, resume_policy
from pipeline.orchestrate.artifacts import NEW, UNKNOWN
from pipeline.orchestrate.at_stake import at_stake
from pipeline.orchestrate.resume_policy import Decision, Resolved
from pipeline.orchestrate.run_state import RunState
from pipeline.prepare.forecast import expected_fingerprint


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Decides about the stages of one call.

    ``resolved``: the job as plain values. ``stages``: those of the call, in the order of the job.
    ``thorough``: read every file of finished stages, because the user named the stages.
    """

    job: Job
    resolved: Resolved
    run_dir: RunDir
    run_state: RunState
    stages: Sequence[str]
    thorough: bool
    forecast: dict[Path, str] = field(default_factory=dict)

    def judge_all(self, *, force: bool) -> dict[str, Decision]:
        """Decide about every stage of the call.

        Args:
            force: all of them restart.

        Raises:
            ConfigError: work would be lost.
            StageError: an input is missing. DataError, CheckpointError: it is damaged.
        """
        decisions: dict[str, Decision] = {}
        for stage in self.stages:
            artifacts.require_intact(self.job, stage, self.run_dir, self.run_state, self.stages)
            inputs = artifacts.inputs(self.job, stage, self.run_dir, self.known())
            artifacts.require(self.job, stage, inputs)
            forced = Decision(action="restart", reason="restarting from scratch (--force)")
            decisions[stage] = forced if force else self.decide(stage, inputs)
            self._foresee(stage, decisions[stage], force=force)
        refused = {name: entry for name, entry in decisions.items() if entry.action == "refuse"}
        if not force:
            refused |= self._refused_outside_the_call(refused)
        if refused:
            raise self.refusal(refused)
        return decisions

    def known(self) -> dict[Path, str]:
        """The forecast, and the digests of finished weights: no need to read them again."""
        return artifacts.finished_weights(self.run_dir, self.run_state) | self.forecast

    def decide(self, stage: str, inputs: Mapping[str, str]) -> Decision:
        """Decide about one stage with these inputs.

        Raises:
            StageError: the settings that it was started with are unknown.
        """
        record = self.run_state.stage(stage)
        damaged: list[str] = []
        if record.state == "done":
            damaged = artifacts.damaged_outputs(record, self.run_dir, thorough=self.thorough)
        changed = artifacts.changed_inputs(record, inputs, self.job, stage, self.run_dir)
        at_stake = self._at_stake(stage)
        if stage == "prepare" and record.state == "failed" and changed:
            # The error asked for a correction of the source. What was read of the faulty one is of
            # no use.
            at_stake = ""
        decision = resume_policy.decide(
            stage,
            record,
            started_with=settings_of(self.run_dir, stage),
            resolved=self.resolved,
            input_changes=[self._described(stage, name) for name in changed],
            damaged=damaged,
            at_stake=at_stake,
        )
        # A training writes its weights again from its last checkpoint. Without one it would begin
        # at step 0, which is what the user has to decide.
        no_checkpoint = stage in TRAINING and not list_checkpoints(self.run_dir.checkpoints(stage))
        if decision.action == "repair" and no_checkpoint:
            cause = f"{damaged[0]} is missing or damaged, and no checkpoint is left to write it"
            return Decision(action="refuse", reason=self._at_stake(stage), differences=[cause])
        return decision

    def refusal(self, refused: Mapping[str, Decision]) -> ConfigError:
        """The error about stages whose work would be discarded: what has changed, what is lost."""
        lines = ["would start from scratch, and finished work would be lost:"]
        for stage, decision in refused.items():
            lines.append(f"    {stage} ({decision.reason})")
            lines += [f"        {difference}" for difference in decision.differences]
        names = [stage for stage in job_queries.stage_names(self.job) if stage in refused]
        # A stage that is still to finish first would be restarted too if it were named here.
        unfinished = {job_queries.source_stage(self.job, stage) for stage in names} - {*names, ""}
        unfinished = {stage for stage in unfinished if self._will_change(stage)}
        trainings = [stage for stage in names if stage in TRAINING]
        if "prepare" not in names and any(map(self._replaces_dataset_of, trainings)):
            names = ["prepare", *names]
        flags = " ".join(f"--stage {stage}" for stage in names)
        first = "".join(f"finish with --stage {stage}, then " for stage in unfinished)
        return ConfigError(
            "\n".join(lines),
            place=", ".join(f"stages.{stage}" for stage in refused),
            remedy="restore the settings and inputs, or give the job another name (--set "
            f"name=NAME); to start from scratch and move the earlier results aside, {first}"
            f"rerun the same command with {flags} --force",
        )

    def _foresee(self, stage: str, decision: Decision, *, force: bool) -> None:
        """Add what a stage will write to the forecast."""
        if stage == "prepare" and decision.action != "skip":
            for name in prepared_names(self.job):
                expected = NEW if force else self._expected_dataset(name)
                self.forecast[self.run_dir.dataset(name)] = expected
        # A repair writes the same weights again. Whatever else runs, ends with new ones.
        if stage in TRAINING and decision.action in ("start", "resume", "restart", "refuse"):
            self.forecast[self.run_dir.weights(stage)] = NEW

    def _expected_dataset(self, name: str) -> str:
        """The fingerprint of the dataset that preparation will leave; NEW or UNKNOWN without it."""
        config = self.job.data[name]
        directory = self.run_dir.dataset(name)
        # Without a training that depends on it, nothing is worth listing a source for.
        if not any(
            self._at_stake(stage) and job_queries.dataset_name(self.job, stage) == name
            for stage in job_queries.training_stages(self.job)
        ):
            return NEW
        try:
            # Synthetic images do not exist before preparation; their settings decide.
            if config.synthetic is not None:
                is_new = any(change.changes_result for change in self._changed_settings(name))
                return NEW if is_new else artifacts.fingerprint(directory)
            return expected_fingerprint(directory, config, self.job.seed)
        except DataError:
            # Damaged, or the source is not there: preparation repairs or reports it.
            return UNKNOWN

    def _changed_settings(self, dataset: str) -> list[Change]:
        """The settings of a dataset that have changed since its preparation, its root included."""
        started_with = settings_of(self.run_dir, "prepare")
        if started_with is None:
            return []
        return [
            change
            for change in changes(started_with, self.resolved, "prepare")
            if change.key == "seed" or change.key.startswith(f"data.{dataset}.")
        ]

    def _described(self, stage: str, name: str) -> str:
        """An input in words, and why it differs."""
        if stage == "prepare":
            return f"input changed: the source of {name}"
        if name == "weights":
            source = str(getattr(job_queries.stage_config(self.job, stage), "initial", ""))
            return f"input changed: the weights to start from ({source or 'none'})"
        if name != "dataset":
            return f"input changed: {name}"
        dataset = job_queries.dataset_name(self.job, stage)
        replaced = self._replaces_dataset_of(stage)
        reasons = [str(change) for change in self._changed_settings(dataset)] if replaced else []
        config = self.job.data[dataset]
        source = config.prepared or config.root or "synthetic"
        return f"input changed: the dataset {dataset} ({'; '.join(reasons) or source})"

    def _replaces_dataset_of(self, stage: str) -> bool:
        """True if preparation in this call would replace the dataset that a training has used."""
        directory = self.run_dir.dataset(job_queries.dataset_name(self.job, stage))
        if directory not in self.forecast:
            return False
        inputs = {"dataset": self.forecast[directory]}
        record = self.run_state.stage(stage)
        return "dataset" in artifacts.changed_inputs(record, inputs, self.job, stage, self.run_dir)

    def _will_change(self, stage: str) -> bool:
        return self.forecast.get(self.run_dir.weights(stage)) == NEW

    def _refused_outside_the_call(self, refused: Mapping[str, Decision]) -> dict[str, Decision]:
        """Trainings that the call does not name, but whose inputs it would replace.

        Preparation alone can replace the dataset of a finished training; and whoever restarts a
        refused training has to restart those that started from its weights.
        """
        outside: dict[str, Decision] = {}
        for stage in job_queries.training_stages(self.job):
            lost = self._at_stake(stage)
            if stage in self.stages or not lost:
                continue
            reasons = []
            if self._replaces_dataset_of(stage):
                reasons.append(self._described(stage, "dataset"))
            if job_queries.source_stage(self.job, stage) in {*refused, *outside}:
                reasons.append(self._described(stage, "weights"))
            if reasons:
                outside[stage] = Decision(action="refuse", reason=lost, differences=reasons)
        return outside

    def _at_stake(self, stage: str) -> str:
        record = self.run_state.stage(stage)
        return at_stake(stage, record, self.run_dir, prepared_names(self.job))
