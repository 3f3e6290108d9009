"""`mllm-audio peer`: other systems on the same captions."""
