"""Write a model as a GGUF file for llama.cpp and Ollama, with its tokenizer and chat template, and read it back."""
