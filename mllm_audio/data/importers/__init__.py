"""Published datasets to manifests that `mllm-audio prepare` reads."""
