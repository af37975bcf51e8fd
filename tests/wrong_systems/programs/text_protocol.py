"""A protocol that is none."""

PROTOCOL = "plant"
