"""Models as the decoder runs them: T5, GPT-2 and Llama families, and any model by its own forward."""
