"""What a start without any warm worker pays for imports, and how much of that is mlx-lm's own."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Final

__all__ = ["imports"]

_ROUNDS: Final = 9
_PARTS: Final = {
    "worker": "import mlx_router_worker.process, mlx_router_worker.engine_imports as e; e.import_engine('mlx')",
    "mlx_lm": "import gc; gc.disable(); import mlx_lm",
    "scans": "u.create_import_structure_from_path(models); u.create_import_structure_from_path(str(models))",
}
_BEFORE: Final = {
    "scans": "import pathlib, transformers, transformers.utils.import_utils as u\n"
    "models = pathlib.Path(transformers.__file__).parent / 'models'\n"
    "u.create_import_structure_from_path.cache_clear()\n"
}


def imports() -> dict[str, float]:
    """Medians of seconds: all imports of a worker, ``import mlx_lm`` alone, and the two readings of all of its model files
    that transformers makes in it."""
    found = {}
    for name, code in _PARTS.items():
        text = f"{_BEFORE.get(name, '')}import time\nbegan = time.monotonic()\n{code}\nprint(time.monotonic() - began)"
        took = [
            float(subprocess.run([sys.executable, "-P", "-c", text], capture_output=True, text=True, check=True).stdout)
            for _ in range(_ROUNDS)
        ]
        found[name] = statistics.median(took)
    return found
