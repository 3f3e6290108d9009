"""`mllm-audio evaluate`: how good generated sound is."""
