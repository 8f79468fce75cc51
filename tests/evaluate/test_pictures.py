"""The pictures of an evaluation are taken from wherever the batch is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.data.prefetch import Batch
from pipeline.evaluate.pictures import take_samples
from pipeline.model import Output


class OnDevice(torch.Tensor):
    """A tensor that refuses, like one on a GPU, to become an array before it is copied."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        return super().__torch_function__(func, types, args, kwargs or {})


def batch_of(images: torch.Tensor) -> Batch:
    count = torch.arange(len(images))
    return Batch(
        images=images, labels=count, samples=count, views=count, positions=count, epoch=0, step=0
    )


def output_of(images: int) -> Output:
    logits = torch.nn.functional.one_hot(torch.arange(images), 3).float()
    return Output([logits], [])


def test_samples_are_taken_from_a_batch_on_a_device() -> None:
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    samples = take_samples(batch_of(images.as_subclass(OnDevice)), output_of(3))
    assert np.array_equal(samples.images, images.numpy())


def test_samples_do_not_change_with_the_memory_of_the_batch() -> None:
    images = torch.zeros((3, 8, 8, 3), dtype=torch.uint8)
    samples = take_samples(batch_of(images), output_of(3))
    images.fill_(255)  # the loader writes the next batch
    assert not samples.images.any()
    assert samples.predictions == [0, 1, 2]
