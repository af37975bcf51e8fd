"""init-lite: a system file becomes a checked plan, and the plan a running system."""
