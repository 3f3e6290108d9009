"""`python -m mllm_audio` is the `mllm-audio` command."""

from mllm_audio.cli import main

if __name__ == "__main__":
    main()
