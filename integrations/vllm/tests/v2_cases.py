"""What `test_v2.py` runs in a process of its own: CASE FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main(case: str, folder: Path) -> None:
    from checkpoints import Reference, exact, write_voice
    from compare import Request, check, stats
    from conftest import ADDRESS, Latents, engine, frames
    from test_engine import TEXTS, mixed

    path = write_voice(folder / "voice")
    reference = Reference(path)
    os.environ[ADDRESS] = frames.new_address()
    pushed = Latents(os.environ[ADDRESS])
    options = {}
    if case == "preempted":
        options = {"num_gpu_blocks_override": 8, "max_model_len": 128, "max_num_seqs": 4}
    with engine(path, **options) as llm:
        if case == "preempted":
            requests = [
                Request(reference.row(TEXTS[n]), exact(0.64), 20 + n, 70) for n in (1, 3, 5, 7)
            ]
        else:
            requests = mixed(reference)
            for request in requests:
                request.max_tokens = 30
        check(llm, reference, requests, pushed)
        counts = stats(llm)
        assert counts["live_states"] == 0, counts
        assert (counts["preempted"] > 0) == (case == "preempted"), counts
        assert counts["latents"] > 20 and counts["runner"] == 2, counts
    print("as generate makes it")
    frames.remove(os.environ[ADDRESS])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
