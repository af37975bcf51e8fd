"""It has the name of a module of Python."""
