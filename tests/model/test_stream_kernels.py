"""Stream kernels: compiled and eager code give the same bits, and the choice between them."""

from __future__ import annotations

import sys

import pytest
import torch
import torch._inductor

from pipeline.model import fixed_point, stream_kernels
from pipeline.model.stream_kernels import StreamKernels

RESOLUTION = fixed_point.make_resolution(18, torch.device("cpu"))
# F about the ends of the stream's range, and values that are not finite.
EDGES = torch.tensor([torch.nan, torch.inf, -torch.inf, 8191.9999, -8192.0, 1e30])


def run_all(
    kernels: StreamKernels,
    f: torch.Tensor,
    stream: torch.Tensor,
    alpha: fixed_point.GridAlpha,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Return every tensor that any kernel returns or updates."""
    gradient = torch.randn(f.shape, generator=torch.Generator().manual_seed(1))
    moved = stream.clone()
    value, remainder = kernels.encode(f, moved, alpha, RESOLUTION, dtype)
    encoded = moved.clone()
    decoded = kernels.decode(
        f, moved, remainder=remainder, gradient=gradient, alpha=alpha, resolution=RESOLUTION
    )
    added = stream.clone()
    return [
        *kernels.start(f, RESOLUTION),
        kernels.add(f, added, alpha, RESOLUTION),
        added,
        value,
        remainder,
        encoded,
        *decoded,
        moved,
        kernels.check_start(f, stream, RESOLUTION),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1000, 24), (777, 7), (64, 130)])
def test_compiled_kernels_give_the_same_bits_as_eager_ones(shape: tuple[int, int]) -> None:
    if not stream_kernels._has_cpp_compiler():
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    f = torch.randn(shape) * 50
    f.view(-1)[: len(EDGES)] = EDGES
    stream = (torch.randn(shape) * 2**24).to(torch.int32)
    compiled = stream_kernels.compiled_kernels()
    for low, high, dtype in (
        (-2.0, 2.0, torch.int16),
        (0.5, 1.0, torch.uint8),
        (1e-3, 1e-2, torch.int16),
    ):
        alpha = fixed_point.grid_alpha(torch.empty(shape[1]).uniform_(low, high))
        torch.testing.assert_close(
            run_all(compiled, f, stream, alpha, dtype),
            run_all(stream_kernels.EAGER, f, stream, alpha, dtype),
            rtol=0,
            atol=0,
            equal_nan=True,
        )
    # Compilation did not fail on the way: otherwise this compared eager code with itself.
    assert all(kernel.compiled is not None for kernel in vars(compiled).values())


def test_compiler_flags_are_added_only_where_they_are_supported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    if sys.platform == "linux" and "cpp.march" in torch._inductor.list_options():
        monkeypatch.setenv("TORCHINDUCTOR_CPP_MARCH", "x86-64-v3")
        march = stream_kernels._compile_options()["cpp.march"]
        assert str(march).startswith("x86-64-v3 -f")
    monkeypatch.setenv("CXX", "clang++")  # vectorises without these flags
    assert stream_kernels._compile_options() == {"cpp.simdlen": 1}
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("torch._inductor.list_options", lambda: ["cpp.simdlen"])  # an older PyTorch
    assert stream_kernels._compile_options() == {"cpp.simdlen": 1}


def test_a_missing_compiler_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stream_kernels._has_cpp_compiler.cache_clear()
    stream_kernels._warn_eager.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu = torch.device("cpu")
    try:
        for _ in range(2):
            assert stream_kernels.kernels_for("auto", cpu, 10**7) is stream_kernels.EAGER
        assert len(caplog.records) == 1
        assert "compiler" in caplog.text
        assert stream_kernels.kernels_for("auto", cpu, 100) is stream_kernels.EAGER
    finally:
        stream_kernels._has_cpp_compiler.cache_clear()


def test_a_failed_compilation_falls_back_to_eager_code(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no such instruction")

    stream_kernels._warn_eager.cache_clear()
    kernel = stream_kernels._CompiledKernel(fixed_point.start, {})
    monkeypatch.setattr(kernel, "compiled", broken)
    f = torch.tensor([[1.0]])
    assert kernel(f, RESOLUTION)[0].item() == 2**18
    assert kernel.compiled is None
    assert "no such instruction" in caplog.text
