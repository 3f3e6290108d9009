"""`mllm-audio import`: published datasets to manifests."""
