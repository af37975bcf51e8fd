"""Small true implementations that tests use in place of the real thing."""
