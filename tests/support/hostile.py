"""Model folders that carry code of their own, as a repository may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["add_code"]

_AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
                 "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")  # fmt: skip
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
            "video_preprocessor_config.json")  # fmt: skip


def add_code(folder: Path, marker: Path) -> Path:
    """Have every configuration file of a model name a class in ``evil.py``, which writes ``marker`` when it is run.
    Returns the folder."""
    names = ("Config", "Tokenizer", "Processor", "Model")
    classes = "\n".join(f"class Evil{name}:\n    pass" for name in names)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'a').write('evil.py was run\\n')\n{classes}\n")
    auto_map: dict[str, Any] = dict.fromkeys(_AUTO_CLASSES, "evil.EvilModel")
    auto_map |= {"AutoConfig": "evil.EvilConfig", "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
                 "AutoProcessor": "evil.EvilProcessor"}  # fmt: skip
    for name in _CONFIGS:
        path = folder / name
        if path.exists():
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**config, "auto_map": auto_map}), encoding="utf-8")
    return folder
