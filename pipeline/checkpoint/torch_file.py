"""Reads the tensors of a file that ``torch.save`` wrote, and runs nothing that is in it.

Such a file is a pickle, which can name any function and call it. PyTorch's restricted reader
(``weights_only=True``) refuses every name that it does not know, also harmless ones: files of the
published training code hold the builtin ``input``, a yacs configuration and an optimizer beside the
weights. Each unknown name is therefore read as an inert stand-in, which records nothing and does
nothing, and is reported.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pipeline.errors import CheckpointError

EMA = "state_dict_ema"
# Where training codes store weights, best first.
_ENTRIES = (EMA, "model_ema", "model", "state_dict")
WHOLE = ""  # in place of an entry: the file is a state dict itself
# Modules of which the restricted reader takes no name at all.
_REFUSED = {"os", "posix", "nt", "sys"}


@dataclass(frozen=True, kw_only=True)
class TorchFile:
    """State dicts of a file by the name of their entry (``WHOLE`` for the file itself).

    ``stand_ins``: the names that were not executed. ``image_size``: of the training, in pixels, if
    the file has the published code's configuration.
    """

    state_dicts: dict[str, dict[str, Tensor]]
    stand_ins: list[str]
    image_size: int | None


def read_torch_file(path: Path) -> TorchFile:
    """Read a file; its tensors are mapped, so that those nobody asks for are never read.

    Raises:
        CheckpointError: it is no such file, is incomplete, holds no weights, or names a function
            of the operating system.
    """
    try:
        # Reads the instructions of the pickle without following them.
        stand_ins = sorted(get_unsafe_globals_in_checkpoint(str(path)))
        # The reader refuses these itself, with the advice to trust the file. That is bad advice.
        _refuse_system_calls(stand_ins)
        names = [(_Mapping if _is_class(name) else _Inert, name) for name in stand_ins]
        with safe_globals(names):  # type: ignore[arg-type]
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(
            f"no weights can be read from it: {_first_sentence(error)}",
            place=str(path),
            remedy="download or copy the file again; it must be one that torch.save wrote",
        ) from None
    state_dicts = _state_dicts(content)
    if not state_dicts:
        raise CheckpointError(
            "holds no weights: no tensors under 'model', 'state_dict_ema' or 'state_dict'",
            place=str(path),
            remedy="name a file of weights",
        )
    return TorchFile(state_dicts=state_dicts, stand_ins=stand_ins, image_size=_image_size(content))


class _Inert:
    """Stands in for functions, and for what they would have returned."""

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Mapping:
    """Stands in for classes, of which a configuration is a dictionary with a name of its own.

    Its objects are plain OrderedDicts: the restricted reader fills no other mapping.
    """

    def __new__(cls, *arguments: object, **options: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()


def _refuse_system_calls(names: list[str]) -> None:
    calls = [name for name in names if name.partition(".")[0] in _REFUSED]
    if calls:
        raise ValueError(f"it would call {', '.join(calls)}")


def _is_class(name: str) -> bool:
    return name.rpartition(".")[2][:1].isupper()


def _first_sentence(error: Exception) -> str:
    return re.split(r"\n|\. ", str(error).strip())[0] or type(error).__name__


def _state_dicts(content: object) -> dict[str, dict[str, Tensor]]:
    if not isinstance(content, Mapping):
        return {}
    # A training code may store an average that it does not use as None.
    candidates = {name: content.get(name) for name in _ENTRIES} | {WHOLE: content}
    return {
        name: tensors
        for name, value in candidates.items()
        if isinstance(value, Mapping) and (tensors := _tensors(value))
    }


def _tensors(value: Mapping[object, object]) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in value.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }


def _image_size(content: object) -> int | None:
    """DATA.IMG_SIZE of the published code's configuration."""
    # Its class is a stand-in by now: an ordinary dictionary.
    for key in ("config", "DATA", "IMG_SIZE"):
        content = content.get(key) if isinstance(content, Mapping) else None
    return content if isinstance(content, int) else None
