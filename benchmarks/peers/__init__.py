"""The contenders of `extract`, each in a process and an environment of its own."""
