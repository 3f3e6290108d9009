"""Start the server on vLLM, and load it: no module here imports vLLM, none torch when imported."""
