"""A bit that flips between forward and backward is detected and localised, or it has no effect."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pipeline.model import Network, consistency, reversible
from pipeline.model.inversion import Inversion
from tests.model.networks import backward, network_with

TENSOR_KINDS = ("stem's output", "stream", "remainder", "stochastic depth", "stem and heads")


class SavedTensors:
    """Records every tensor that a pass saves for its backward pass, and flips a bit of one.

    ``tensors``: by kind, pairs of a tensor and the beginning of the report's line about it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: dict[str, list[tuple[torch.Tensor, str]]] = {}
        finish_forward = reversible.ReversibleRun.finish_forward
        checksum = consistency.checksum

        def recording(run: reversible.ReversibleRun, x: torch.Tensor, shapes: Any) -> None:
            finish_forward(run, x, shapes)
            assert run.saved is not None
            self.record(run.saved)

        def recording_checksum(tensor: torch.Tensor) -> torch.Tensor:
            self.tensors.setdefault("stem and heads", []).append(
                (tensor, "a tensor saved for the stem or a head")
            )
            return checksum(tensor)

        monkeypatch.setattr(reversible.ReversibleRun, "finish_forward", recording)
        monkeypatch.setattr(consistency, "checksum", recording_checksum)

    def record(self, saved: Inversion) -> None:
        columns = saved.columns
        assert columns.drop_path_scales is not None
        self.tensors["stem's output"] = [(saved.x, "the stem's output")]
        self.tensors["stream"] = [
            (tensor, f"level {i} of the saved column") for i, tensor in enumerate(saved.stream)
        ]
        levels = ((t, i) for t in range(1, columns.count) for i in range(4))
        self.tensors["remainder"] = [
            (tensor, f"column {t}, level {i}:")
            for tensor, (t, i) in zip(saved.remainders, levels, strict=True)
        ]
        self.tensors["stochastic depth"] = [
            (columns.drop_path_scales, "the stochastic-depth factors")
        ]

    def flip(self, kind: str, choice: random.Random) -> str:
        """Flip a bit. Returns the beginning of the line that must report it."""
        tensor, line = choice.choice([pair for pair in self.tensors[kind] if pair[0].numel()])
        raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        begin = tensor.storage_offset() * tensor.element_size()
        byte = begin + choice.randrange(tensor.element_size() * tensor.numel())
        raw[byte] ^= 1 << choice.randrange(8)
        return line


def gradients_with_flip(
    network: Network, saved: SavedTensors, seed: int, precision: str, flip: str = ""
) -> tuple[list[torch.Tensor], str]:
    """Run a pass, flip a bit of kind ``flip`` -> (gradients, line that must report it)."""
    network.zero_grad()
    saved.tensors.clear()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    uniforms = torch.rand(2, network.uniforms, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = network(images, uniforms)
        sums = [value.float().sum() for value in (*out.logits, *out.reconstructions)]
        loss = torch.stack(sums).sum()
    line = saved.flip(flip, random.Random(seed)) if flip else ""
    loss.backward()  # type: ignore[no-untyped-call]
    return [p.grad.clone() for p in network.parameters() if p.grad is not None], line


def all_finite(gradients: list[torch.Tensor]) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.slow
def test_every_bit_flip_is_detected_and_localised_or_has_no_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = SavedTensors(monkeypatch)
    detected = 0
    network = network_with("wide", columns=5, huge=True, supervised=True, drop_path=0.3)
    network.skip_on_mismatch = True
    for trial in range(200):
        precision = ("fp32", "bf16")[trial % 2]
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("alpha"):
                    parameter.uniform_(-2, 2, generator=torch.Generator().manual_seed(trial))
        kind = TENSOR_KINDS[trial % len(TENSOR_KINDS)]
        gradients, line = gradients_with_flip(network, saved, trial, precision, kind)
        if int(network.consistency.mismatched_elements):
            detected += 1
            report = network.consistency.report()
            assert report[0].startswith(line), (trial, line, report)
            assert not all_finite(gradients), trial  # the engine skips the step
        else:
            expected, _ = gradients_with_flip(network, saved, trial, precision)
            pairs = zip(gradients, expected, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), (trial, line)
    assert detected > 150


@pytest.mark.parametrize(("t", "i"), [(0, 0), (3, 2), (5, 3), (2, 0)])
def test_a_fault_in_the_recompute_is_reported_where_it_happened(t: int, i: int) -> None:
    network = network_with("wide", columns=6)
    out = network(torch.randn(2, 3, 32, 32))
    level = network.columns[t].levels[i]  # type: ignore[union-attr,index]
    level.blocks[-1].register_forward_hook(
        lambda module, inputs, output: output + (output == output.max()) * 1e-4
    )
    out.logits[-1].sum().backward()
    assert network.consistency.report()[0].startswith(f"column {t}, level {i}:")


@pytest.mark.parametrize("skip_on_mismatch", [True, False])
def test_a_mismatch_makes_gradients_nonfinite_only_if_steps_are_to_be_skipped(
    skip_on_mismatch: bool,
) -> None:
    network = network_with("trained", columns=3)
    network.skip_on_mismatch = skip_on_mismatch
    out = network(torch.randn(2, 3, 32, 32))
    network.consistency.mismatched[0, 0] = 1
    out.logits[-1].sum().backward()
    gradients = [p.grad for p in network.stem.parameters() if p.grad is not None]
    assert all_finite(gradients) is not skip_on_mismatch


@pytest.mark.parametrize(("bias", "reported"), [(9000.0, "90"), (torch.nan, "nan")])
def test_an_overflow_is_reported_and_makes_gradients_nonfinite_if_steps_are_to_be_skipped(
    bias: float, reported: str
) -> None:
    network = network_with("trained", columns=4)
    network.skip_on_overflow = True
    with torch.no_grad():
        network.get_parameter("columns.1.levels.2.down.norm.bias").fill_(bias)
    _, gradients = backward(network, torch.randn(2, 3, 32, 32))
    first = network.consistency.report()[0]
    assert first.startswith(f"column 1, level 2: |value| is {reported}")
    assert "ends at 8192" in first
    assert "fraction_bits" in first
    assert not all_finite(list(gradients.values()))


def test_an_overflow_leaves_gradients_finite_for_optimizers_that_do_not_skip_steps() -> None:
    network = network_with("trained", columns=4)
    with torch.no_grad():
        network.get_parameter("columns.1.levels.2.down.norm.bias").fill_(9000.0)
    with pytest.warns(RuntimeWarning, match="column 1, level 2"):
        _, gradients = backward(network, torch.randn(2, 3, 32, 32))
    assert network.consistency.report()
    assert all_finite(list(gradients.values()))


def test_a_remainder_that_does_not_fit_is_reported_and_makes_gradients_nonfinite() -> None:
    network = network_with("trained", columns=3)
    network.skip_on_overflow = True
    network.remainder_widths = [[4] * 4 for _ in range(3)]
    _, gradients = backward(network, torch.randn(2, 3, 32, 32))
    assert network.consistency.report() == []
    assert all_finite(list(gradients.values()))
    network.remainder_widths[2][1] = 0
    _, gradients = backward(network, torch.randn(2, 3, 32, 32))
    assert network.consistency.report()[0].startswith("column 2, level 1: alpha became too small")
    assert not all_finite(list(gradients.values()))
