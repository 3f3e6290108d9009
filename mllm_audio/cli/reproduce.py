"""`mllm-audio reproduce`: the paper's tables and figures."""
