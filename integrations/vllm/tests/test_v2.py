"""The V2 model runner, which is that of GPUs, on a CPU through Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# vLLM looks for a driver of Triton's CPU backend, which has no package; the interpreter needs none.
SHIM = """
import os, types
if os.environ.get("MLLM_AUDIO_TEST_V2") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    class Driver:
        @staticmethod
        def is_active():
            return True

    backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["side_by_side", "preempted"])
def test_v2_runner(tmp_path, case):
    """In a process of its own: the interpreter is chosen before anything is imported."""
    (tmp_path / "sitecustomize.py").write_text(SHIM)
    environment = {
        **os.environ,
        "MLLM_AUDIO_TEST_V2": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(HERE)]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "v2_cases.py"), case, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "as generate makes it" in done.stdout
