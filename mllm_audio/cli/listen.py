"""`mllm-audio listen`: blind listening tests."""
