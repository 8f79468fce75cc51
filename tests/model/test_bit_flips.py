"""A bit that flips between forward and backward is found and localised, or it has no effect. There is no third outcome."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pipeline.model import Network, consistency, reversible
from tests.model.test_exact import backward, network_with

KINDS = ("stem's output", "stream", "remainder", "stochastic depth", "stem and heads")


class Kept:
    """Everything that a pass keeps for its backward pass, by kind, and the flip of one bit of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: dict[str, list[tuple[torch.Tensor, str]]] = {}
        original, fingerprint = reversible.ExactColumns.forward, consistency.fingerprint

        def forward(ctx: Any, *arguments: Any) -> Any:
            save = ctx.save_for_backward

            def recording(x: torch.Tensor, *kept: torch.Tensor) -> None:
                last = arguments[1].count - 1
                self.tensors["stem's output"] = [(x, "the stem's output")]
                self.tensors["stream"] = [
                    (v, f"level {i} of the kept column") for i, v in enumerate(kept[:4])
                ]
                where = ((t, i) for t in range(1, last + 1) for i in range(4))
                self.tensors["remainder"] = [
                    (v, f"column {t}, level {i}:")
                    for v, (t, i) in zip(kept[4:], where, strict=True)
                ]
                self.tensors["stochastic depth"] = [
                    (arguments[1].keep, "the stochastic-depth factors")
                ]
                save(x, *kept)

            ctx.save_for_backward = recording
            return original(ctx, *arguments)

        def seen(tensor: torch.Tensor) -> torch.Tensor:
            self.tensors.setdefault("stem and heads", []).append(
                (tensor, "a tensor kept for the stem or a head")
            )
            return fingerprint(tensor)

        monkeypatch.setattr(reversible.ExactColumns, "forward", staticmethod(forward))
        monkeypatch.setattr(consistency, "fingerprint", seen)

    def flip(self, kind: str, choice: random.Random) -> str:
        """Flip a bit; where it lies, as a report names it."""
        tensor, place = choice.choice([(v, place) for v, place in self.tensors[kind] if v.numel()])
        raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        begin = tensor.storage_offset() * tensor.element_size()
        raw[begin + choice.randrange(tensor.element_size() * tensor.numel())] ^= (
            1 << choice.randrange(8)
        )
        return place


def gradients(
    network: Network, kept: Kept, seed: int, precision: str, flip: str = ""
) -> tuple[list[torch.Tensor], str]:
    network.zero_grad()
    kept.tensors.clear()
    generator = torch.Generator().manual_seed(seed)
    images, uniforms = (
        torch.randn(2, 3, 32, 32, generator=generator),
        torch.rand(2, network.uniforms, generator=generator),
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = network(images, uniforms)
        loss = torch.stack(
            [value.float().sum() for value in (*out.logits, *out.reconstructions)]
        ).sum()
    place = kept.flip(flip, random.Random(seed)) if flip else ""
    loss.backward()  # type: ignore[no-untyped-call]
    return [p.grad.clone() for p in network.parameters() if p.grad is not None], place


@pytest.mark.slow
def test_every_flip_is_found_and_localised_or_has_no_effect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, outcomes = Kept(monkeypatch), {"found": 0, "without effect": 0}
    network = network_with("wide", columns=5, huge=True, supervised=True, drop_path=0.3)
    for trial in range(200):
        precision = ("fp32", "bf16")[trial % 2]
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name.endswith("alpha"):
                    parameter.uniform_(-2, 2, generator=torch.Generator().manual_seed(trial))
        found, place = gradients(network, kept, trial, precision, KINDS[trial % len(KINDS)])
        if int(network.consistency.mismatched_elements):
            outcomes["found"] += 1
            assert network.consistency.report()[0].startswith(place), (
                trial,
                place,
                network.consistency.report(),
            )
            assert not all(g.isfinite().all() for g in found), trial  # the engine skips the step
        else:
            outcomes["without effect"] += 1
            expected, _ = gradients(network, kept, trial, precision)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (
                trial,
                place,
            )
    assert outcomes["found"] > 150, outcomes


def test_a_fault_in_the_recompute_is_found_where_it_happened() -> None:
    network = network_with("wide", columns=6)
    for t, i in ((0, 0), (3, 2), (5, 3), (2, 0)):
        out = network(torch.randn(2, 3, 32, 32))
        level = network.columns[t].levels[i]  # type: ignore[union-attr,index]
        handle = level.blocks[-1].register_forward_hook(
            lambda module, inputs, output: output + (output == output.max()) * 1e-4
        )
        out.logits[-1].sum().backward()
        handle.remove()
        assert network.consistency.report()[0].startswith(f"column {t}, level {i}:")


def test_withholding_can_be_switched_off() -> None:
    network = network_with("trained", columns=3)
    for skip_on_mismatch in (True, False):
        network.skip_on_mismatch = skip_on_mismatch
        out = network(torch.randn(2, 3, 32, 32))
        network.consistency.mismatched[0, 0] = 1
        network.zero_grad()
        out.logits[-1].sum().backward()
        finite = all(
            p.grad.isfinite().all() for p in network.stem.parameters() if p.grad is not None
        )
        assert finite is not skip_on_mismatch


def test_leaving_the_range_is_reported_and_withheld() -> None:
    network = network_with("trained", columns=4)
    with torch.no_grad():
        network.get_parameter("columns.1.levels.2.down.norm.bias").fill_(9000)
    _, found = backward(network, torch.randn(2, 3, 32, 32))
    first = network.consistency.report()[0]
    assert (
        first.startswith("column 1, level 2: |value| is 90")
        and "ends at 8192" in first
        and "fraction_bits" in first
    )
    assert not all(g.isfinite().all() for g in found.values())
    with torch.no_grad():
        network.get_parameter("columns.1.levels.2.down.norm.bias").fill_(torch.nan)
    backward(network, torch.randn(2, 3, 32, 32))
    assert network.consistency.report()[0].startswith("column 1, level 2: |value| is nan")


def test_a_remainder_that_does_not_fit_is_reported_and_withheld() -> None:
    network = network_with("trained", columns=3)
    network.remainder_widths = [[4] * 4 for _ in range(3)]
    _, found = backward(network, torch.randn(2, 3, 32, 32))
    assert network.consistency.report() == [] and all(g.isfinite().all() for g in found.values())
    network.remainder_widths[2][1] = 0
    _, found = backward(network, torch.randn(2, 3, 32, 32))
    assert network.consistency.report()[0].startswith("column 2, level 1: alpha became too small")
    assert not all(g.isfinite().all() for g in found.values())
