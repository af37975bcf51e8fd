"""The proof runner: boots a system on a ground, compares evidence, prints a verdict."""
