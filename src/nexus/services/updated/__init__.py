"""updated: signed system sets in two slots, tried, and kept or left."""
