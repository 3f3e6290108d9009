"""Write tests/golden/tiny_losses.json: the losses of twenty training steps on short tones.

    python tests/golden/write.py

Run it only when a change is meant to alter training, and say so in the commit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import sine_manifest
from test_training import CONFIG, GOLDEN, losses

from mllm_audio.data.prepare import prepare
from mllm_audio.run import train_run

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(sine_manifest(folder), folder / "data", "dct", progress=False)
        train_run(CONFIG, folder / "data", folder / "run")
        GOLDEN.write_text(json.dumps(losses(folder / "run")) + "\n")
