"""The network in one file without imports of this project, for folders that others read.

The file is made of the parts of this package: their imports, sorted, and what follows the mark in
each of them.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.layout import HUB_CODE

_MARK = "# --- bundled from here on ---\n"
_PARTS = ("layers", "network", "libraries")
_DOCSTRING = f'''"""RevCol (Cai et al., Reversible Column Networks, ICLR 2023) in one file. It needs torch.

Where timm is installed, importing this file registers the models with timm. Where transformers is
installed, it defines the classes that ``trust_remote_code=True`` asks for. The network is computed
plainly, in floating point and with stored activations: for use and fine-tuning, not pretraining.
Maps are (N, H, W, C) inside and (N, C, H, W) outside. Example::

    import timm, {Path(HUB_CODE).stem}
    model = timm.create_model("local-dir:FOLDER", pretrained=True)
"""

'''


def bundle() -> str:
    """The text of the file."""
    imports: dict[str, set[str]] = {}
    parts = []
    for name in _PARTS:
        head, _, part = Path(__file__).with_name(f"{name}.py").read_text().partition(_MARK)
        parts.append(part.strip())
        for module, names in re.findall(r"^from (\S+) import (.+)$", head, re.MULTILINE):
            if not module.startswith("pipeline"):
                imports.setdefault(module, set()).update(names.split(", "))
        for module in re.findall(r"^import (\S+)$", head, re.MULTILINE):
            imports.setdefault(module, set())
    lines = ["from __future__ import annotations", ""]
    imports.pop("__future__")
    for is_torch in (False, True):
        chosen = [module for module in sorted(imports) if module.startswith("torch") is is_torch]
        # Plain imports first, as the formatter has them.
        for module in sorted(chosen, key=lambda module: bool(imports[module])):
            names = ", ".join(sorted(imports[module]))
            lines.append(f"from {module} import {names}" if names else f"import {module}")
        lines.append("")
    return _DOCSTRING + "\n".join(lines) + "\n" + "\n\n\n".join(parts) + "\n"
