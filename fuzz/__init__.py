"""One entry per decoder that reads what others have written."""
