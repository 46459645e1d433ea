"""The `llamacpp` engine: GGUF models run by llama.cpp, steered by control vectors. Needs `trimtab[llamacpp]`."""
