"""Boot control: which slot is booted, and what loader and init tell each other about it."""
