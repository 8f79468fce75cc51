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
_DOCSTRING = f'''"""RevCol (Cai et al., Reversible Column Networks, ICLR 2023). Needs torch.

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
    # The imports of all parts become one block, without duplicates.
    modules: set[str] = set()
    names: dict[str, set[str]] = {}
    parts = []
    for name in _PARTS:
        # What is bundled stands below the mark; above it, imports and what only the package needs.
        head, _, part = Path(__file__).with_name(f"{name}.py").read_text().partition(_MARK)
        parts.append(part.strip())
        modules |= set(re.findall(r"^import (\S+)$", head, re.MULTILINE))
        for module, imported in re.findall(r"^from (\S+) import (.+)$", head, re.MULTILINE):
            if not module.startswith(("pipeline", "__future__")):
                names.setdefault(module, set()).update(imported.split(", "))
    lines = [f"import {module}" for module in sorted(modules)]
    lines += [
        f"from {module} import {', '.join(sorted(names[module]))}" for module in sorted(names)
    ]
    # The standard library first, as the formatter has it.
    standard = [line for line in lines if "torch" not in line]
    others = [line for line in lines if "torch" in line]
    imports = ["from __future__ import annotations", "", *standard, "", *others]
    return _DOCSTRING + "\n".join(imports) + "\n\n" + "\n\n\n".join(parts) + "\n"
