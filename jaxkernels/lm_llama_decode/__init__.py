"""lm.llama_decode@1: text generation, one token a step; see `api`."""
