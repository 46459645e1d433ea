"""The engine `llamacpp`: GGUF models run by llama.cpp, steered by its control vectors. Needs `trimtab[llamacpp]`."""
