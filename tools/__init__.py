"""Checks of this tree, and the pages that are written from it."""
